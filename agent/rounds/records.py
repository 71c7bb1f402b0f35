"""Rounds in the ledger: planning one, its manifest, its moves, and what is said of it.

Knows what a round may learn from; how a round runs is `training`, how it is judged is `look`.
"""

import importlib.util
import json
import tomllib
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from agent.errors import Problem
from agent.ledger import audit, states
from agent.ledger.database import Ledger, Row, utc, when
from agent.site.site import Site
from cxrloop.plate import PLATE_VERSION
from learner.errors import RecipeError
from learner.round.recipe import RECIPES, Recipe, resolve

USABLE = "plate IS NOT NULL AND heartbeat = 0 AND superseded_by IS NULL"
YEAR = timedelta(days=365)


def plan(site: Site, ledger: Ledger, why: str, now: datetime, recipe: str | None = None, look: bool = False) -> Row:
    """Write the row and the folder of a new round; `why` is "now" or "night".

    Raises Problem when nothing can be learnt, and then writes nothing.
    """
    from cxrloop.durable import write_json

    if importlib.util.find_spec("torch") is None:
        raise Problem("learning needs torch, which is not installed: pip install 'cxrloop[train]'")
    resolved = resolve_recipe(site, recipe or site.config.learn.recipe)
    parent = parent_of_next(ledger)
    if parent and begins_anew(site, parent, resolved):
        parent = None
    chosen = training_images(site, ledger)
    labelled = sum(row["range"] == "train" and any(v is not None for v in row["labels"]) for row in chosen)
    unlabelled = sum(row["range"] == "train" for row in chosen)
    if not unlabelled:
        raise Problem("round: no image in the train range yet; send or import images first")
    if not labelled:
        raise Problem(
            "round: no labelled image in the train range; import labels first (`cxrloop labels import FILE.csv`)"
        )
    with ledger.transaction():
        number = (ledger.value("SELECT max(id) FROM round") or 0) + 1
        name = f"r{number:04d}"
        newest = ledger.value("SELECT max(id) FROM image") or 0
        ledger.insert(
            "round",
            id=number, name=name, state="planned", why=why, recipe=resolved.name,
            parent=parent["id"] if parent else None, unlabelled=unlabelled, labelled=labelled, look=int(look), last_image=newest, planned_at=utc(now),
        )  # fmt: skip
        audit.append(ledger, "cxrloop", "round planned", why, after={"round": name, "recipe": resolved.name})
    folder = site.rounds / name
    folder.mkdir(exist_ok=True)
    state = f"../../{parent['training_state']}" if parent else None
    manifest = {
        "version": 2, "round": name, "plate_version": PLATE_VERSION, "findings": list(site.findings),
        "recipe": resolved.to_dict(), "seed": resolved.seed or number, "plates": "../../store",
        "parent": {"bundle": parent["id"], "state": state} if parent else None, "until": None, "images": chosen,
    }  # fmt: skip
    write_json(folder / "manifest.json", manifest)
    return get(ledger, name)


def resolve_recipe(site: Site, name: str) -> Recipe:
    """A recipe by name, or from a TOML file with `base = "NAME"` and changed keys; raises Problem."""
    learn = site.config.learn
    overrides: dict[str, Any] = {} if learn.backbone == "random" else {"backbone": _backbone(site, learn.backbone)}
    path = site.root / name
    try:
        if name.endswith(".toml"):
            if not path.is_file():
                raise Problem(f'recipe = "{name}": no such file under {site.root}')
            keys = _table(path)
            base = str(keys.pop("base", ""))
            if base not in RECIPES:
                raise Problem(f'{path}: base = "{base}": must be one of {", ".join(sorted(RECIPES))}')
            return resolve(base, learn.profile, {**overrides, "name": path.stem, **keys})
        return resolve(name, learn.profile, overrides)
    except RecipeError as error:
        raise Problem(str(error)) from None


def _table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except ValueError as error:  # not TOML, or not UTF-8
        raise Problem(f"{path}: {error}") from None


def _backbone(site: Site, backbone: str) -> str:
    return str((site.root / backbone).resolve()) if backbone.endswith(".safetensors") else backbone


def parent_of_next(ledger: Ledger) -> Row | None:
    """The last passed round's bundle that was not taken back, else the baseline; None without a learnt state."""
    return ledger.row(
        "SELECT b.* FROM bundle b LEFT JOIN round r ON r.bundle = b.id "
        "WHERE b.training_state IS NOT NULL AND b.state NOT IN ('rejected', 'withdrawn', 'refused') "
        "AND (b.is_baseline = 1 OR r.state = 'passed') ORDER BY r.id IS NULL, r.id DESC LIMIT 1"
    )


def begins_anew(site: Site, parent: Row, recipe: Recipe) -> bool:
    """True when the recipe names another backbone than the one that the parent's line began with, or the site other findings.

    Going on would pass the backbone over, and a class head fits its own findings alone. A file that was moved since, or
    no name at all, is no other backbone.
    """
    from cxrloop.durable import read_json

    card = read_json((site.root / parent["training_state"]).with_name("card.json"))
    if card.get("findings", [*site.findings]) != [*site.findings]:
        return True
    began = card.get("recipe", {}).get("backbone", recipe.backbone)
    moved = Path(began).name == Path(recipe.backbone).name and not Path(began).exists()
    return recipe.backbone not in ("random", began) and not moved


def training_images(site: Site, ledger: Ledger) -> list[dict[str, Any]]:
    """What the learner may see: newest train images up to the cap, labelled ones always, and the labelled reserve."""
    cap = site.config.learn.max_unlabelled
    rows = ledger.rows(
        f"SELECT id, patient_key, plate, range FROM image WHERE {USABLE} AND range = 'train' ORDER BY id DESC LIMIT ?",
        cap,
    )
    rows += ledger.rows(
        f"SELECT id, patient_key, plate, range FROM image WHERE {USABLE} "
        "AND range IN ('train','calibration','validation') AND id IN (SELECT image FROM label)"
    )
    labels: dict[int, dict[str, int]] = {}
    for row in ledger.rows(
        f"SELECT image, finding, value FROM label_now JOIN image ON image.id = label_now.image "
        f"WHERE {USABLE} AND range IN ('train','calibration','validation')"
    ):
        labels.setdefault(row["image"], {})[row["finding"]] = row["value"]
    unique = {row["id"]: row for row in rows}
    return [
        {
            "image": image,
            "patient": row["patient_key"],
            "plate": row["plate"],
            "range": row["range"],
            "labels": [labels.get(image, {}).get(finding) for finding in site.findings],
        }
        for image, row in sorted(unique.items())
    ]


def get(ledger: Ledger, name: str) -> Row:
    """A round by its name or by its bundle; raises Problem."""
    row = ledger.row("SELECT * FROM round WHERE name = ? OR bundle = ? ORDER BY id DESC LIMIT 1", name, name)
    if not row:
        known = ", ".join(r["name"] for r in ledger.rows("SELECT name FROM round ORDER BY id DESC LIMIT 5"))
        raise Problem(f"round {name!r}: no such round; the newest are: {known or '(none yet)'}")
    return row


def open_round(ledger: Ledger) -> Row | None:
    """The round that has not come to its end, if any."""
    marks = ", ".join("?" for _ in states.OPEN_ROUNDS)
    return ledger.row(f"SELECT * FROM round WHERE state IN ({marks}) ORDER BY id LIMIT 1", *states.OPEN_ROUNDS)


def advance(ledger: Ledger, name: str, state: str, because: str = "", **columns: Any) -> None:
    """Move a round along its table, inside the caller's transaction; raises IllegalMove."""
    row = get(ledger, name)
    states.check(states.ROUND, f"round {name}", row["state"], state)
    if state not in states.OPEN_ROUNDS:
        columns["ended_at"] = utc()
    changed = {"state": state, "reason": because or None, **columns}
    sets = ", ".join(f"{key} = ?" for key in changed)
    ledger.run(f"UPDATE round SET {sets} WHERE name = ? AND state = ?", *changed.values(), name, row["state"])
    audit.append(ledger, "cxrloop", f"round {state}", because, before=row["state"], after={"round": name, **columns})


def want_look(ledger: Ledger, name: str) -> None:
    """Ask a round that is not at its end yet to end with a look."""
    with ledger.transaction():
        ledger.run("UPDATE round SET look = 1 WHERE name = ?", name)


def cancel(site: Site, ledger: Ledger, name: str, by: str) -> Row:
    """Stop a round for good; a learner that runs sees it and leaves."""
    with ledger.transaction():
        advance(ledger, name, "cancelled", f"by {by}")
    return get(ledger, name)


def summary(ledger: Ledger, row: Row) -> dict[str, Any]:
    """What scripts read of a round."""
    stored = ledger.row("SELECT v.json FROM look l JOIN verdict v ON v.look = l.id WHERE l.round = ?", row["name"])
    return {
        "round": row["name"],
        "state": row["state"],
        "bundle": row["bundle"],
        "unlabelled": row["unlabelled"],
        "labelled": row["labelled"],
        "seconds": round(row["seconds"], 1),
        "verdict": json.loads(stored["json"]) if stored else None,
        "reason": row["reason"],
        "recipe": row["recipe"],
        "parent": row["parent"],
        "planned_at": row["planned_at"],
        "ended_at": row["ended_at"],
    }


def progress(site: Site, name: str) -> dict[str, Any] | None:
    """The learner's progress.json, if it has written one."""
    path: Path = site.rounds / name / "progress.json"
    return json.loads(path.read_text()) if path.exists() else None


def budget(site: Site, ledger: Ledger, now: datetime) -> dict[str, float | int]:
    """Looks and alpha spent and left in the last 365 days; a new golden set gives nothing back."""
    gate = site.config.gate
    rows = ledger.rows("SELECT alpha FROM look WHERE at > ?", utc(now - YEAR))
    spent = sum(row["alpha"] for row in rows)
    left = max(0, gate.evaluations_per_year - len(rows))
    return {
        "spent": round(spent, 6),
        "left": round(max(0.0, gate.alpha - spent), 6),
        "looks_spent": len(rows),
        "looks_left": left if gate.alpha - spent > 1e-9 else 0,
    }


def look_due(site: Site, ledger: Ledger, now: datetime) -> bool:
    """True when a year's looks, spread evenly, allow the next one now; counted from the first model's deployment."""
    last = ledger.value("SELECT max(at) FROM look") or ledger.value("SELECT min(at) FROM deployment")
    return last is not None and now - when(last) >= YEAR / site.config.gate.evaluations_per_year
