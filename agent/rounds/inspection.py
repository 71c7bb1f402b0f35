"""What `round show`, `round logs` and `verdict` read: a round's row, its verdict, its progress, losses, picture and log.

Reads the ledger and what the learner leaves in the round's folder; writes nothing.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.errors import Problem
from agent.ledger.database import Ledger
from agent.ledger.states import OPEN_ROUNDS
from agent.rounds import records
from agent.rounds.evaluation_budget import budget
from agent.rounds.records import Round
from agent.site import locks
from agent.site.site import Site
from cxrloop.durable import read_json

POLL_S = 0.5


def summary(ledger: Ledger, current: Round) -> dict[str, Any]:
    """Return what `round ls` and `round run` print of a round; `verdict` is its newest verdict, or None."""
    return {
        "round": current.name,
        "state": current.state,
        "bundle": current.bundle,
        "unlabelled": current.unlabelled,
        "labelled": current.labelled,
        "seconds": round(current.seconds, 1),
        "verdict": records.newest_verdict(ledger, current),
        "reason": current.reason,
        "recipe": current.recipe,
        "parent": current.parent,
        "planned_at": current.planned_at,
        "ended_at": current.ended_at,
    }


def verdict(site: Site, ledger: Ledger, current: Round) -> dict[str, Any]:
    """Return the newest verdict of a round, with the budget as it is now; raises Problem when the round has none."""
    stored = records.newest_verdict(ledger, current)
    if stored is None:
        why = f": {current.reason}" if current.reason else ""
        raise Problem(f"verdict {current.name}: no verdict; the round is {current.state}{why}")
    return {**stored, "budget": budget(site, ledger, datetime.now(UTC)).to_json()}


def progress(folder: Path) -> dict[str, Any]:
    """Return the learner's newest progress; empty before it has written any."""
    return read_json(folder / "progress.json")


def learning(folder: Path) -> dict[str, Any]:
    """Return what the learner has measured in this folder.

    Each phase with its steps, the newest losses and monitors, the candidate that was chosen, the comparisons with raw pixels and with the parent, notes, the picture's path.
    """
    from learner.round.collapse_limits import LIMITS  # here: `round ls` and `verdict` need no numpy
    from learner.round.metrics_log import read

    curves = read(folder)
    newest_phase = curves.phases[-1] if curves.phases else None
    monitors: dict[str, float | None] = {}
    for phase in curves.phases:
        monitors |= phase.last(tuple(LIMITS))
    picture, card = folder / "round.png", read_json(folder / "final" / "card.json")
    return {
        "phases": [{"phase": p.name, "step": p.step, "steps": p.steps} for p in curves.phases],
        "losses": newest_phase.last(curves.losses) if newest_phase else {},
        "monitors": {
            name: {"value": value, "within": value is None or LIMITS[name].allows(value)}
            for name, value in monitors.items()
        },
        "candidate": card.get("candidate"),
        "floor": card.get("floor"),
        "forgetting": card.get("forgetting"),
        "notes": card.get("notes", []),
        "figure": str(picture) if picture.exists() else None,
    }


def log(folder: Path, begin: int = 0) -> bytes:
    """Return the learner's log from this byte on; empty before there is one."""
    path = folder / "learner.log"
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(begin)
        return file.read()


def follow(
    site: Site, ledger: Ledger, name: str, write: Callable[[bytes], None], tell: Callable[[dict[str, Any]], None]
) -> Round:
    """Write the log as it grows, and tell the progress, until the round rests; return the round as it is then.

    A round rests at its end, when it is paused, and when no process runs it.
    """
    folder, begin = site.rounds / name, 0
    while True:
        current = records.get(ledger, name)  # another process changes it
        runs = current.state in OPEN_ROUNDS and current.state != "paused" and locks.is_held(site, "round")
        new = log(folder, begin)  # after reading the state: the log of a round that rests is complete
        begin += len(new)
        write(new)
        if not runs:
            return records.get(ledger, name)
        if newest := progress(folder):
            tell(newest)
        time.sleep(POLL_S)
