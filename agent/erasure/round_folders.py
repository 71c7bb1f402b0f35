"""What round folders hold of images that are to be forgotten: manifest rows, packed plates, tokens, checkpoints.

A round that is learning from them is cancelled. Trained weights can't be undone; the bundles are named. Sealed bundles
hold no image, so they stay as they are.
"""

import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from agent.ledger.database import Ledger, Row
from agent.rounds import records
from agent.rounds.tidying import remove_working_files
from agent.site import locks
from agent.site.site import Site
from cxrloop.durable import write_json
from learner.errors import RoundBusy
from learner.round.folder import lock_round
from learner.round.manifest import read_manifest

UNFINISHED = ("planned", "training", "paused")
LEAVE_S = 60  # a cancelled learner learns of it within a second and ends within 25
POLL_S = 0.5


def rounds_with(site: Site, ledger: Ledger, images: Collection[int]) -> list[Row]:
    """Return the rounds whose manifest lists one of these images, oldest first."""
    if not images:
        return []
    candidates = ledger.rows("SELECT * FROM round WHERE last_image >= ? ORDER BY id", min(images))
    return [row for row in candidates if set(images) & _listed_images(site.rounds / row["name"])]


def _listed_images(folder: Path) -> set[int]:
    """Return the images that a round's manifest lists; none without a manifest (skipped, imported, not written yet)."""
    return {sample["image"] for sample in _manifest(folder).get("images", [])}


def _round_of_backbone(folder: Path) -> str:
    """Return the name of the folder that holds a round's initial backbone: the round that made it, if a round did."""
    return Path(_manifest(folder).get("recipe", {}).get("backbone", "")).parent.name


def _manifest(folder: Path) -> dict[str, Any]:
    """Return a round's manifest with today's keys; empty without one."""
    try:
        return read_manifest(folder)
    except FileNotFoundError:
        return {}


def affected_models(site: Site, ledger: Ledger, images: Collection[int]) -> dict[str, Any]:
    """Return `{"rounds", "cancels", "bundles"}`: rounds with these images, and bundles trained on them or descended.

    A bundle descends from an affected bundle or backbone that its round started from.
    """
    rounds = rounds_with(site, ledger, images)
    direct = {row["name"] for row in rounds}
    bundles: list[dict[str, Any]] = []
    affected_rounds, affected_bundles = set(direct), set[str]()
    for row in ledger.rows("SELECT * FROM round ORDER BY id"):
        name = row["name"]
        descends = row["parent"] in affected_bundles or _round_of_backbone(site.rounds / row["name"]) in affected_rounds
        if name not in direct and not descends:
            continue
        affected_rounds.add(name)
        for bundle in ledger.rows("SELECT id, state FROM bundle WHERE round = ? ORDER BY created_at", name):
            affected_bundles.add(bundle["id"])
            bundles.append(
                {"bundle": bundle["id"], "round": name, "state": bundle["state"], "directly": name in direct}
            )
    return {
        "rounds": [row["name"] for row in rounds],
        "cancels": [row["name"] for row in rounds if row["state"] in UNFINISHED],
        "bundles": bundles,
    }


def clear_rounds(site: Site, ledger: Ledger, images: Collection[int]) -> bool:
    """Cancel rounds that learn from these images, and remove the images from all round folders.

    Returns False when a learner still runs or a round is being planned: call it again later.
    """
    if _being_planned(site, ledger):
        return False
    for row in rounds_with(site, ledger, images):
        with ledger.transaction():
            unfinished = records.get(ledger, row["name"])
            if unfinished.state in UNFINISHED:
                records.advance(ledger, unfinished, "cancelled", "one of its images was forgotten")
        if not _clear_when_free(site.rounds / row["name"], images):
            return False
    return True


def _being_planned(site: Site, ledger: Ledger) -> bool:
    """Return True while a planner holds the lock and its round has no manifest: the manifest may list the images."""
    planned = records.open_round(ledger)
    return bool(
        planned and not (site.rounds / planned.name / "manifest.json").exists() and locks.is_held(site, "round")
    )


def _clear_when_free(folder: Path, images: Collection[int]) -> bool:
    """Clear a round's folder when its learner has ended; False after LEAVE_S seconds."""
    deadline = time.monotonic() + LEAVE_S
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
    """Remove everything that holds an image, and the images' rows of the manifest."""
    remove_working_files(folder)
    manifest = read_manifest(folder)
    forgotten = [sample for sample in manifest["images"] if sample["image"] in images]
    words = {str(sample[name]).encode() for sample in forgotten for name in ("patient", "plate")}
    log = folder / "learner.log"
    if log.exists() and any(word in log.read_bytes() for word in words):  # a message about one of the images
        log.unlink()
    manifest["images"] = [sample for sample in manifest["images"] if sample["image"] not in images]
    write_json(folder / "manifest.json", manifest)  # last: after a crash the manifest still lists what is to be cleared
