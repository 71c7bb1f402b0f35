"""Tidy rounds that have ended: remove what no later round and no evidence needs.

Two steps for each round. Its working files (checkpoints, packed plates, tokens, the unsealed copy of the model) go when it
has ended. Its training state goes when `retention.rounds` newer rounds have ended and no round can start from it. Manifest,
result, metrics, log, picture and card stay for good. Each step can be repeated; a tick reads the rounds that are not done.
"""

import shutil
from pathlib import Path

from agent.ledger.database import Ledger, Row
from agent.ledger.states import OPEN_ROUNDS
from agent.site.site import Site
from learner.errors import RoundBusy
from learner.round.folder import lock_round

# Files of a round's folder that stay when the round has ended; none holds an image, so `forget` leaves them, too.
KEPT = frozenset((
    "manifest.json", "result.json", "progress.json", "metrics.jsonl", "learner.log", "lock", "round.png",
    "backbone.safetensors", "t0", "final",
))  # fmt: skip
PARTS = ("t0", "final")  # folders of bundle parts
SEALED = ("model.onnx", "probe.npz")  # copies: the sealed bundle holds both
STATE = "state.safetensors"
WORKING_GONE, STATE_GONE = 1, 2  # `round.tidied`

# Bundles whose training state a later round may need: the baseline, a passed round's that was not taken back, and the parent
# of a round that has not ended.
PARENTS = (
    "SELECT training_state FROM bundle b LEFT JOIN round r ON r.bundle = b.id WHERE training_state IS NOT NULL AND ("
    "(b.state NOT IN ('rejected', 'refused') AND (b.is_baseline = 1 OR r.state = 'passed')) "
    f"OR b.id IN (SELECT parent FROM round WHERE state IN {OPEN_ROUNDS}))"
)


def step(site: Site, ledger: Ledger) -> int:
    """Remove the files that ended rounds no longer need; return the number of rounds that changed."""
    ended = ledger.rows(
        f"SELECT name, tidied FROM round WHERE state NOT IN {OPEN_ROUNDS} AND tidied < ? ORDER BY id DESC", STATE_GONE
    )
    count = sum(_remove_working_files(site, ledger, row) for row in ended if row["tidied"] < WORKING_GONE)
    if newest := site.config.retention.rounds:
        count += _remove_training_states(site, ledger, newest)
    return count


def _remove_working_files(site: Site, ledger: Ledger, row: Row) -> bool:
    """Remove a round's working files; False while its learner has not ended (a cancelled one takes some seconds)."""
    folder = site.rounds / row["name"]
    if folder.is_dir():
        try:
            with lock_round(folder):
                remove_working_files(folder)
                for part in PARTS:
                    for name in SEALED:
                        (folder / part / name).unlink(missing_ok=True)
        except RoundBusy:
            return False
    with ledger.transaction():
        ledger.run("UPDATE round SET tidied = ? WHERE name = ?", WORKING_GONE, row["name"])
    return True


def remove_working_files(folder: Path) -> None:
    """Remove everything of a round's folder that is not in KEPT. The caller holds the folder's lock."""
    for path in folder.iterdir():
        if path.name in KEPT:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove_training_states(site: Site, ledger: Ledger, newest: int) -> int:
    """Remove the training states of rounds beyond the newest ones, except those of possible parents."""
    older = ledger.rows(
        f"SELECT name FROM round WHERE tidied = ? AND id <= (SELECT id FROM round WHERE state NOT IN {OPEN_ROUNDS} "
        "AND state != 'skipped' ORDER BY id DESC LIMIT 1 OFFSET ?)",
        WORKING_GONE, newest,
    )  # fmt: skip
    if not older:
        return 0
    needed = {row["training_state"] for row in ledger.rows(PARENTS)}
    count = 0
    for row in older:
        places = [f"rounds/{row['name']}/{part}/{STATE}" for part in PARTS]
        for place in places:
            if place not in needed and (site.root / place).exists():
                with ledger.transaction():  # first: nobody looks for a file that is being removed
                    ledger.run("UPDATE bundle SET training_state = NULL WHERE training_state = ?", place)
                (site.root / place).unlink()
        if not needed & set(places):
            with ledger.transaction():
                ledger.run("UPDATE round SET tidied = ? WHERE name = ?", STATE_GONE, row["name"])
            count += 1
    return count
