"""Plan a round: what it may learn from, its recipe and its parent, its row in the ledger and its manifest."""

import importlib.util
import tomllib
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from agent.errors import Problem
from agent.images import pool
from agent.images.pool import USABLE
from agent.ledger import audit
from agent.ledger.database import Ledger, canonical
from agent.release import models
from agent.release.models import Model
from agent.rounds import backbones, records
from agent.rounds.records import Round
from agent.site.site import Site
from cxrloop.durable import read_json
from learner.round.manifest import write_manifest
from learner.round.recipe import RECIPES, Recipe, RecipeError, resolve
from learner.round.recipe_checks import check_used


def plan(
    site: Site, ledger: Ledger, why: str, now: datetime, recipe: str | None = None, evaluate: bool = False
) -> Round:
    """Write the row and the folder of a new round; `why` is "now" or "night".

    `evaluate`: end with an evaluation on the golden set. Raises Problem, and writes nothing, when the site has nothing to
    learn from.
    """
    if importlib.util.find_spec("torch") is None:
        raise Problem("learning needs torch, which is not installed: pip install 'cxrloop[train]'")
    resolved = resolve_recipe(site, recipe or site.config.learn.recipe)
    parent, notes = parent_of_next(ledger), []
    if parent and not (site.root / str(parent.training_state)).is_file():
        notes = [f"the parent's training state {parent.training_state} is missing, so the round starts fresh"]
        parent = None
    if parent and starts_fresh(site, parent, resolved):
        parent = None
    if nothing := nothing_to_learn(site, ledger):
        raise Problem(f"round: {nothing}")
    chosen = training_images(site, ledger, now)
    labelled = sum(row["range"] == "train" and any(v is not None for v in row["labels"]) for row in chosen)
    unlabelled = sum(row["range"] == "train" for row in chosen)
    with ledger.transaction():
        planned = records.add(
            ledger, now, "planned", why, resolved.name,
            parent=parent.id if parent else None, unlabelled=unlabelled, labelled=labelled, evaluate=int(evaluate),
            last_image=ledger.value("SELECT max(id) FROM image") or 0,
        )  # fmt: skip
        after = {"round": planned.name, "recipe": resolved.name} | ({"notes": notes} if notes else {})
        audit.append(ledger, "cxrloop", "round planned", why, after=after)
    folder = site.rounds / planned.name
    folder.mkdir(exist_ok=True)
    write_manifest(
        folder, findings=site.findings, recipe=resolved,
        seed=resolved.seed or int(planned.name[1:]), plates="../../store", images=chosen,
        parent=(parent.id, f"../../{parent.training_state}") if parent else None, notes=notes,
    )  # fmt: skip
    return planned


def nothing_to_learn(site: Site, ledger: Ledger) -> str | None:
    """Return what the site lacks for a round and what to do, or None."""
    if not ledger.value(f"SELECT 1 FROM image WHERE {USABLE} AND range = 'train' LIMIT 1"):
        return "no image in the train range yet; send or import images first"
    labelled = ledger.rows(
        f"SELECT DISTINCT finding FROM label_now JOIN image ON image.id = label_now.image "
        f"WHERE {USABLE} AND range = 'train' AND value IS NOT NULL ORDER BY finding"
    )
    known = [row["finding"] for row in labelled]
    if not known:
        return "no labelled image in the train range; import labels first (`cxrloop labels import FILE.csv`)"
    if not set(known) & set(site.findings):
        return (
            f"no labelled image in the train range has a finding of site.findings ({', '.join(site.findings)}); labels "
            f"there name {', '.join(known)}: import labels of the new findings, or name these in site.findings"
        )
    return None


def resolve_recipe(site: Site, name: str) -> Recipe:
    """Return a recipe by its name, or from a TOML file with `base = "NAME"` and changed keys; raises Problem."""
    learn = site.config.learn
    overrides: dict[str, Any] = {} if learn.backbone == "random" else {"backbone": learn.backbone}
    path = site.root / name
    try:
        if name.endswith(".toml"):
            if not path.is_file():
                raise Problem(f'recipe = "{name}": no such file under {site.root}')
            keys = _table(path)
            base = str(keys.pop("base", ""))
            if base not in RECIPES:
                raise Problem(f'{path}: base = "{base}": must be one of {", ".join(sorted(RECIPES))}')
            resolved = resolve(base, learn.profile, {**overrides, "name": path.stem, **keys})
            check_used(resolved, resolve(base, learn.profile, overrides), keys)
            return backbones.identified(site, resolved)
        return backbones.identified(site, resolve(name, learn.profile, overrides))
    except RecipeError as error:
        raise Problem(str(error)) from None


def _table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except ValueError as error:  # not TOML, or not UTF-8
        raise Problem(f"{path}: {error}") from None


def parent_of_next(ledger: Ledger) -> Model | None:
    """Return the model whose weights the next round starts from, or None where no model has learnt weights.

    The bundle of the newest passed round that was not taken back, else the baseline.
    """
    bundle = ledger.value(
        "SELECT b.id FROM bundle b LEFT JOIN round r ON r.bundle = b.id "
        "WHERE b.training_state IS NOT NULL AND b.state NOT IN ('rejected', 'withdrawn', 'refused') "
        "AND (b.is_baseline = 1 OR r.state = 'passed') ORDER BY r.id IS NULL, r.id DESC LIMIT 1"
    )
    return models.get(ledger, bundle) if bundle else None


def starts_fresh(site: Site, parent: Model, recipe: Recipe) -> bool:
    """Return True when a round can't start from this parent: another backbone, or other findings.

    Starting from the parent would ignore the recipe's backbone, and a class head fits its own findings only.
    """
    assert parent.training_state is not None
    card = read_json((site.root / parent.training_state).with_name("card.json"))
    if card.get("findings", [*site.findings]) != [*site.findings]:
        return True
    return backbones.is_another(card.get("recipe", {}), recipe)


def training_images(site: Site, ledger: Ledger, now: datetime) -> list[dict[str, Any]]:
    """Return the images that a round learns from, one dict each with the keys of the manifest.

    Every labelled image of the ranges train, calibration and validation, and the pool drawn from the unlabelled images of
    the train range. Golden images are never among them.
    """
    columns = "SELECT id, patient_key, plate, range, view, scanner FROM image WHERE"
    labelled = ledger.rows(
        f"{columns} {USABLE} AND range IN ('train','calibration','validation') AND id IN (SELECT image FROM label)"
    )
    drawn = pool.draw(site, ledger, now, Counter(row["patient_key"] for row in labelled if row["range"] == "train"))
    rows = labelled + ledger.rows(f"{columns} id IN (SELECT value FROM json_each(?))", canonical(sorted(drawn)))
    labels: dict[int, dict[str, int]] = {}
    for row in ledger.rows(
        f"SELECT image, finding, value FROM label_now JOIN image ON image.id = label_now.image "
        f"WHERE {USABLE} AND range IN ('train','calibration','validation')"
    ):
        labels.setdefault(row["image"], {})[row["finding"]] = row["value"]
    return [
        {
            "image": row["id"],
            "patient": row["patient_key"],
            "plate": row["plate"],
            "range": row["range"],
            "view": row["view"],
            "scanner": row["scanner"],
            "labels": [labels.get(row["id"], {}).get(finding) for finding in site.findings],
            "why": drawn.get(row["id"], "labelled"),
        }
        for row in sorted(rows, key=lambda row: row["id"])
    ]
