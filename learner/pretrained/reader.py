"""Pretrained weights: one reader for files and models of the hub, for training, for `backbone check` and for `fetch`.

Every tensor of a file is matched, set aside by a rule of its family, or unused; training rejects unused and missing ones.
"""

import json
import re
import warnings
from dataclasses import dataclass, field, replace
from math import isqrt
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import nn

from learner.errors import LearnerError
from learner.networks.architecture import ARCH, Plan, plan_of, timm_name
from learner.networks.backbone import build, timm_network
from learner.networks.convnet import ConvNet
from learner.networks.vit import Backbone
from learner.pretrained import hub
from learner.pretrained.families import TRAINING_STATE, Family, Tensors, prefix_of, recognise
from learner.pretrained.weight_file import read_tensors
from learner.round.backbone_file import SUFFIX, is_file_name
from learner.round.recipe import Recipe

SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1536: "giant"}  # by embedding width
DEPTHS = {"large": 24, "huge": 32, "giant": 40}  # blocks; all other sizes have 12
SHOWN = 5  # names of tensors in an error message; `backbone check` names all


@dataclass(frozen=True)
class Pretrained:
    """Weights of a file with what is known of them. Lists hold names: of the file, but `missing` timm's names."""

    plan: Plan = field(default_factory=dict)  # empty: no family was recognised
    tensors: Tensors | None = None  # timm's names, float32; None for random weights
    family: str | None = None
    matched: tuple[str, ...] = ()
    set_aside: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()  # also those of another shape
    image_size: int | None = None  # pixels a side in pretraining
    mean: tuple[float, ...] | None = None  # of grey levels in [0, 1], one per channel
    std: tuple[float, ...] | None = None
    licence: str | None = None
    source: str | None = None
    sha256: str = ""

    def report(self) -> dict[str, Any]:
        """Return the JSON document of `backbone check`."""
        lists = {name: list(getattr(self, name)) for name in ("matched", "set_aside", "unused", "missing")}
        return {
            "family": self.family, "arch": arch_name(self.plan) if self.plan else None, **lists,
            "image_size": self.image_size, "mean": self.mean and list(self.mean), "std": self.std and list(self.std),
            "licence": self.licence, "sha256": self.sha256, "source": self.source,
        }  # fmt: skip

    def require_whole(self, name: str) -> "Pretrained":
        """Return self. Raises LearnerError, which names the tensors, where some are unused or missing."""
        if not self.plan:
            raise LearnerError(
                f"backbone {name}: the tensors' names are of no known family (no cls_token of a vision transformer), and "
                'the file has no metadata `timm`; set the timm name, such as arch = "densenet121", or save the file with '
                "metadata `timm`"
            )
        faults = [(self.unused, "unused"), (self.missing, "missing or of another shape")]
        texts = [f"{len(names)} tensors {what}: {_some(names)}" for names, what in faults if names]
        if texts:
            raise LearnerError(
                f"backbone {name} ({self.family}): {'; '.join(texts)}; `cxrloop backbone check` names all"
            )
        return self


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def open_backbone(recipe: Recipe) -> Pretrained:
    """Return the recipe's backbone; without tensors, and with a warning, for "random". Raises LearnerError.

    Also for a file whose content is not that which the round was planned with.
    """
    if recipe.backbone == "random":
        warnings.warn(
            f"no pretrained backbone: {recipe.arch} starts from random weights and will learn little from few images; "
            "give one with --backbone FILE",
            stacklevel=2,
        )
        return Pretrained(plan_of(recipe.arch, recipe.image_size))
    path = Path(recipe.backbone)
    if path.is_file() and not is_file_name(recipe.backbone):
        raise LearnerError(f"backbone {path}: {convert_hint(path)}")
    opened = examine(recipe.backbone, recipe.arch).require_whole(recipe.backbone)
    if recipe.backbone_sha256 not in ("", opened.sha256):
        raise LearnerError(
            f"backbone {path}: its tensors have changed since the round was planned (SHA-256 {opened.sha256[:12]}, planned "
            f"{recipe.backbone_sha256[:12]}); restore the file, or cancel the round"
        )
    return opened


def convert_hint(path: Path) -> str:
    """Return what to do with a file that is no safetensors file."""
    return f"not a {SUFFIX} file; convert it: cxrloop backbone fetch {path} --out {path.with_suffix(SUFFIX).name}"


def examine(name: str, arch: str = "") -> Pretrained:
    """Return the weights of a file or of a model of the hub, whole or not; `arch`: a timm name for files without one.

    Raises LearnerError for a file that can't be read, and for a name that neither a file nor the hub has.
    """
    if is_file_name(name) or Path(name).exists():
        return read_pretrained(Path(name), arch)
    return read_pretrained(*hub.download(name))


def read_pretrained(path: Path, arch: str = "", note: dict[str, str] | None = None) -> Pretrained:
    """Return the weights of a file; `note` adds to the file's metadata. Raises LearnerError for a file that can't be read."""
    tensors, own, sha256 = read_tensors(path)
    note = {**own, **(note or {})}
    name = timm_name(note.get("timm", ""))
    known = None if name else recognise(tensors)
    if known:
        read = _match(*known, tensors, note, str(path))
    elif name or (arch and not ARCH.fullmatch(arch) and timm.is_model(timm_name(arch))):
        read = _match_named(name or timm_name(arch), tensors, str(path))
    else:
        read = Pretrained(unused=tuple(sorted(tensors)))
    family = known[0] if known else None
    return replace(
        read, sha256=sha256, licence=note.get("licence"), source=note.get("source"),
        family=read.family and note.get("family", read.family), image_size=_image_size(read.plan, note, family),
        mean=_numbers(note, "mean") or (family.mean if family else None),
        std=_numbers(note, "std") or (family.std if family else None),
    )  # fmt: skip


def _image_size(plan: Plan, note: dict[str, str], family: Family | None) -> int | None:
    """Return the image side in pretraining: of the metadata, the position embeddings, the family or timm."""
    if "image_size" in note:
        return int(_numbers(note, "image_size")[0])
    if "img_size" in plan:
        return plan["img_size"]
    if family and family.image_size:
        return family.image_size
    config = timm.get_pretrained_cfg(plan["timm"]) if plan else None
    return config.input_size[-1] if config else None


def _numbers(note: dict[str, str], key: str) -> tuple[float, ...]:
    """Return the numbers of a metadata key, JSON; none without the key. Raises LearnerError for anything else."""
    try:
        values = json.loads(note.get(key, "[]"))
        return tuple(float(value) for value in (values if isinstance(values, list) else [values]))
    except (ValueError, TypeError):
        raise LearnerError(f"metadata {key} = {note[key]!r}: needs a number, or a list of numbers") from None


def _match(family: Family, prefix: str, tensors: Tensors, note: dict[str, str], path: str) -> Pretrained:
    """Return the weights of a file of a known family. Raises LearnerError where the plan can't be inferred."""
    aside = {key for key in tensors if _is_aside(key, prefix, family.set_aside)}
    origin = {}  # timm's name: the file's
    for key in tensors:
        if key.startswith(prefix) and key not in aside:
            target = key.removeprefix(prefix)
            for pattern, replacement in family.rename:
                target = re.sub(pattern, replacement, target)
            origin[target] = key
    converted = family.convert({target: tensors[key] for target, key in origin.items()})
    plan = family.plan(converted, note, path)
    return _compare(family.name, plan, converted, tensors, aside, origin, prefix)


def _is_aside(key: str, prefix: str, patterns: tuple[str, ...]) -> bool:
    """Whether the encoder never needs a tensor: by the family's patterns, or because it is a training state."""
    name = key.removeprefix(prefix)
    outside = bool(prefix) and not key.startswith(prefix)
    rules = patterns + TRAINING_STATE if outside or not prefix else patterns
    return any(re.search(pattern, name) for pattern in rules)


def _match_named(name: str, tensors: Tensors, path: str) -> Pretrained:
    """Return the weights of a file whose network timm has under this name. Raises LearnerError."""
    if not timm.is_model(name):
        raise LearnerError(
            f'backbone {path}: timm = "{name}": no timm model of that name; save the file with another one'
        )
    with torch.device("meta"):  # shapes only
        net, whole = build({"timm": name}), timm.create_model(name)
    expected = timm_network(net).state_dict()
    prefix = prefix_of("cls_token" if "cls_token" in expected else next(iter(expected)), tensors) or ""
    inside = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
    # timm's own classifier, and layers before it that the encoder does not run
    aside = {inside[key] for key in whole.state_dict().keys() - expected.keys() if key in inside}
    aside |= {key for key in tensors if _is_aside(key, prefix, ())}
    origin = {target: key for target, key in inside.items() if key not in aside}
    converted = {target: tensors[key] for target, key in origin.items()}
    plan: Plan = {"timm": name}
    if isinstance(net, Backbone) and "pos_embed" in converted:
        prefixes = 0 if net.vit.no_embed_class else net.vit.num_prefix_tokens
        side = isqrt(max(0, converted["pos_embed"].shape[1] - prefixes))
        if side != net.vit.patch_embed.grid_size[0]:
            plan["img_size"] = side * net.patch
    return _compare("timm network", plan, converted, tensors, aside, origin, prefix)


def _compare(
    family: str, plan: Plan, converted: Tensors, tensors: Tensors, aside: set[str], origin: dict[str, str], prefix: str
) -> Pretrained:
    """Return the weights that fit the network of the plan, and what is unused and missing."""
    with torch.device("meta"):
        expected = timm_network(build(plan)).state_dict()
    fitting = {key for key, value in expected.items() if key in converted and converted[key].shape == value.shape}
    left = set(converted) - fitting
    unused = {origin.get(key, key) for key in left} | {
        k for k in tensors if not k.startswith(prefix) and k not in aside
    }
    return Pretrained(
        plan, {key: converted[key] for key in expected if key in fitting}, family,
        matched=tuple(sorted(set(origin.values()) - unused)), set_aside=tuple(sorted(aside)),
        unused=tuple(sorted(unused)), missing=tuple(key for key in expected if key not in fitting),
    )  # fmt: skip


def weights_of(backbone: Backbone | ConvNet, plan: Plan) -> tuple[Tensors, dict[str, str]]:
    """Return the weights with timm's key names, and the file metadata that `read_pretrained` needs."""
    net: nn.Module = timm_network(backbone)
    return {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}, note_of(plan)


def note_of(plan: Plan) -> dict[str, str]:
    """Return the metadata from which `read_pretrained` infers this plan."""
    return {"timm": str(plan["timm"])} if "timm" in plan else {"num_heads": str(plan["num_heads"])}


def as_file(read: Pretrained) -> bytes:
    """Return a safetensors file of the encoder's tensors, with all that is known of them as its metadata."""
    note = note_of(read.plan)
    for key in ("family", "licence", "source", "image_size", "mean", "std"):
        value = getattr(read, key)
        if value is not None:
            note[key] = value if isinstance(value, str) else json.dumps(value)
    return save({key: value.contiguous() for key, value in (read.tensors or {}).items()}, metadata=note)


def arch_name(plan: Plan) -> str:
    """Return a network's name: timm's, or one like vit_small_patch14_reg4 from the plan's sizes."""
    if "timm" in plan:
        return plan["timm"]
    size = SIZES.get(plan["embed_dim"], f"{plan['embed_dim']}wide")
    depth = "" if plan["depth"] == DEPTHS.get(size, 12) else f"_depth{plan['depth']}"
    registers = f"_reg{plan['reg_tokens']}" if plan.get("reg_tokens") else ""
    return f"{'eva02' if plan.get('eva') else 'vit'}_{size}_patch{plan['patch_size']}{depth}{registers}"
