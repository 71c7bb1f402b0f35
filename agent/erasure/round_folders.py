"""What rounds hold of images that are to be forgotten: their manifest's lines, packed plates, tokens, checkpoints.

A round that is still learning from them is cancelled; weights that were learnt can't be undone and are named. Touches
no sealed bundle: those hold no image.
"""

import json
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from agent.ledger.database import Ledger, Row
from agent.rounds import records
from agent.site import locks
from agent.site.site import Site
from cxrloop.durable import read_json, write_json
from learner.errors import RoundBusy
from learner.round.folder import lock_round

LEARNING = ("planned", "training", "paused")
LEAVES_S = 60  # a cancelled learner is told within a second and promises to be gone within 25
POLL_S = 0.5
# What of a round's folder holds no image: weights, curves, the log, the parts of bundles. All else goes.
KEPT = frozenset((
    "manifest.json", "result.json", "progress.json", "metrics.jsonl", "learner.log", "lock", "round.png",
    "backbone.safetensors", "t0", "final",
))  # fmt: skip


def holding(site: Site, ledger: Ledger, images: Collection[int]) -> list[Row]:
    """The rounds whose manifest lists one of these images, oldest first."""
    if not images:
        return []
    later = ledger.rows("SELECT * FROM round WHERE last_image >= ? ORDER BY id", min(images))
    return [row for row in later if set(images) & _listed(site.rounds / row["name"])]


def _listed(folder: Path) -> set[int]:
    try:
        return {image["image"] for image in json.loads((folder / "manifest.json").read_bytes())["images"]}
    except FileNotFoundError:  # skipped, imported, or not written yet
        return set()


def _begun_with(folder: Path) -> str:
    """The round that left the backbone this one began with; of another backbone, whatever its folder is called."""
    return Path(read_json(folder / "manifest.json").get("recipe", {}).get("backbone", "")).parent.name


def learnt(site: Site, ledger: Ledger, images: Collection[int]) -> dict[str, Any]:
    """`{"rounds", "cancels", "bundles"}`: who learnt from these images, and which bundles descend from that."""
    held_by = holding(site, ledger, images)
    names = {row["name"] for row in held_by}
    bundles: list[dict[str, Any]] = []
    tainted, spoilt = set[str](), set(names)  # bundles and rounds
    for row in ledger.rows("SELECT * FROM round ORDER BY id"):
        begun = _begun_with(site.rounds / row["name"])
        if row["name"] not in names and row["parent"] not in tainted and begun not in spoilt:
            continue
        spoilt.add(row["name"])
        for bundle in ledger.rows("SELECT id, state FROM bundle WHERE round = ? ORDER BY created_at", row["name"]):
            tainted.add(bundle["id"])
            directly = row["name"] in names
            bundles.append(
                {"bundle": bundle["id"], "round": row["name"], "state": bundle["state"], "directly": directly}
            )
    return {
        "rounds": [row["name"] for row in held_by],
        "cancels": [row["name"] for row in held_by if row["state"] in LEARNING],
        "bundles": bundles,
    }


def clear(site: Site, ledger: Ledger, images: Collection[int]) -> bool:
    """Cancel rounds that learn from these images, then take the images out of every round's folder.

    False when a learner has not left yet, or a round is just being planned: to be called again.
    """
    if _being_planned(site, ledger):
        return False
    for row in holding(site, ledger, images):
        with ledger.transaction():
            if records.get(ledger, row["name"])["state"] in LEARNING:
                records.advance(ledger, row["name"], "cancelled", "an image of it was forgotten")
        if not _cleared(site.rounds / row["name"], images):
            return False
    return True


def _being_planned(site: Site, ledger: Ledger) -> bool:
    """A round whose row is there and whose manifest is not may be about to list an image (the planner holds the lock)."""
    row = records.open_round(ledger)
    return bool(row and not (site.rounds / row["name"] / "manifest.json").exists() and locks.is_held(site, "round"))


def _cleared(folder: Path, images: Collection[int]) -> bool:
    deadline = time.monotonic() + LEAVES_S
    while True:
        try:
            with lock_round(folder):
                _clear(folder, images)
                return True
        except RoundBusy:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)


def _clear(folder: Path, images: Collection[int]) -> None:
    for path in folder.iterdir():
        if path.name in KEPT:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    manifest = json.loads((folder / "manifest.json").read_bytes())
    gone = [image for image in manifest["images"] if image["image"] in images]
    words = {str(image[key]).encode() for image in gone for key in ("patient", "plate")}
    log = folder / "learner.log"
    if log.exists() and any(word in log.read_bytes() for word in words):  # a complaint about one of the images
        log.unlink()
    manifest["images"] = [image for image in manifest["images"] if image["image"] not in images]
    write_json(folder / "manifest.json", manifest)  # last: until now it says that there is something to clear
