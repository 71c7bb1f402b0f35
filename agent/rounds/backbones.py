"""Backbones: what a file or a model of the hub is, its download, and whether a round's backbone is another than its parent's.

The learner reads weights, in a process of its own: this process must not load torch. Comparing needs no torch.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agent.errors import Problem
from agent.rounds.training import QUIET
from agent.site.site import Site
from learner.errors import LearnerError
from learner.round.backbone_file import content_hash, is_file_name
from learner.round.recipe import Recipe


def check(name: str, arch: str = "") -> dict[str, Any]:
    """Return what a file, or a model of the hub, is: the document of `backbone check`. Raises Problem."""
    return _learner([name, "--arch", arch])


def fetch(name: str, out: Path, arch: str = "") -> dict[str, Any]:
    """Write a backbone to a new safetensors file; return what that file is. Raises Problem."""
    return _learner([name, "--arch", arch, "--out", str(out)])


def _learner(words: Sequence[str]) -> dict[str, Any]:
    missing = [name for name in ("torch", "timm", "safetensors") if find_spec(name) is None]
    if missing:
        raise Problem(f"backbone: {missing[0]} is not installed; run: pip install 'cxrloop[train]'")
    done = subprocess.run(
        [sys.executable, "-m", "learner.pretrained.check", *words],
        capture_output=True, text=True, env={**QUIET, **os.environ},
    )  # fmt: skip
    if done.returncode:
        why = done.stderr.strip().splitlines() or [f"the learner ended with exit code {done.returncode}"]
        raise Problem(why[-1])
    return json.loads(done.stdout)


def faults(report: Mapping[str, Any]) -> list[str]:
    """Return why a backbone can't be used, one text a fault, with the tensors' names; none for a whole backbone."""
    if report["family"] is None:
        return ["its tensors are of no known family; save it with metadata `timm`, or give --arch NAME"]
    kinds = (("unused", "unused"), ("missing", "missing or of another shape"))
    return [f"{len(report[key])} tensors {what}: {', '.join(report[key])}" for key, what in kinds if report[key]]


def identified(site: Site, recipe: Recipe) -> Recipe:
    """Return the recipe with the full path of its backbone file and the hash of the file's tensors, "" without the file.

    Raises Problem for a file that can't be read.
    """
    if not is_file_name(recipe.backbone):
        return recipe
    path = (site.root / recipe.backbone).resolve()
    try:
        known = content_hash(path) if path.is_file() else ""
    except LearnerError as error:
        raise Problem(f"backbone {error}") from None
    return recipe.override({"backbone": str(path), "backbone_sha256": known})


def is_another(first: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether the recipe's backbone is another one than that of an earlier recipe, given as its JSON values.

    Files are compared by the hash of their tensors, whatever their names. Where one hash is not known (a model of the
    hub, a missing file, a round of 0.1), names decide; a file that was moved since has the same name. "random" is no other.
    """
    name = str(first.get("backbone", recipe.backbone))
    if recipe.backbone == "random":
        return False
    known = first.get("backbone_sha256") or _hash_now(name)
    if known and recipe.backbone_sha256:
        return known != recipe.backbone_sha256
    moved = Path(name).name == Path(recipe.backbone).name and not Path(name).exists()
    return recipe.backbone != name and not moved


def _hash_now(name: str) -> str:
    """Return the hash of the tensors that a file holds now, "" where it can't be read or the name is of the hub."""
    try:
        return content_hash(Path(name)) if is_file_name(name) else ""
    except (LearnerError, OSError):
        return ""
