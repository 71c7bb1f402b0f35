"""What a round shows of itself: how far its phases are, its newest losses and monitors, its picture, its log.

Reads what the learner leaves in the round's folder and writes nothing; rows and moves are `rounds`.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.ledger.database import Ledger, Row
from agent.ledger.states import OPEN_ROUNDS
from agent.rounds import records
from agent.site import locks
from agent.site.site import Site
from cxrloop.durable import read_json
from learner.round.collapse_limits import LIMITS
from learner.round.metrics_log import read

POLL_S = 0.5


def learning(folder: Path) -> dict[str, Any]:
    """Phases with the steps done, newest losses of the newest phase and newest monitors, the candidate chosen, notes, the picture."""
    curves = read(folder)
    newest = curves.phases[-1] if curves.phases else None
    monitors: dict[str, float | None] = {}
    for phase in curves.phases:
        monitors |= phase.last(tuple(LIMITS))
    picture, card = folder / "round.png", read_json(folder / "final" / "card.json")
    return {
        "phases": [{"phase": p.name, "step": p.step, "steps": p.steps} for p in curves.phases],
        "losses": newest.last(curves.losses) if newest else {},
        "monitors": {
            name: {"value": value, "within": value is None or LIMITS[name].allows(value)}
            for name, value in monitors.items()
        },
        "candidate": card.get("candidate"),
        "notes": card.get("notes", []),
        "figure": str(picture) if picture.exists() else None,
    }


def newest(ledger: Ledger) -> Row | None:
    """The round under way, else the newest one."""
    return records.open_round(ledger) or ledger.row("SELECT * FROM round ORDER BY id DESC LIMIT 1")


def log(folder: Path, begin: int = 0) -> bytes:
    """What the learner has written to its log from this byte on."""
    path = folder / "learner.log"
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(begin)
        return file.read()


def follow(site: Site, ledger: Ledger, name: str, write: Callable[[bytes], None], told: Callable[[dict], None]) -> Row:
    """Write the log as it grows, and tell the progress, until the round rests; the row it rests in.

    It rests at its end, when it is paused, and when no process carries it on.
    """
    folder, begin = site.rounds / name, 0
    while True:
        row = records.get(ledger, name)
        on = row["state"] in OPEN_ROUNDS and row["state"] != "paused" and locks.is_held(site, "round")
        new = log(folder, begin)  # after the look at the state: what a round at rest has written is complete
        begin += len(new)
        write(new)
        if not on:
            return records.get(ledger, name)
        if progress := records.progress(site, name):
            told(progress)
        time.sleep(POLL_S)
