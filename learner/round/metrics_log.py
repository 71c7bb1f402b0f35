"""What metrics.jsonl says: the steps of a round by phase, and the notes between them. Reading only.

Knows names and numbers, no torch and no picture. A line that the learner is still writing is left out.
"""

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from learner.round.collapse_limits import LIMITS

PLACE = ("kind", "phase", "step", "steps", "burst", "seconds")  # where a row belongs; no measurement
RATES = ("lr", "momentum")  # what a step was taken with


@dataclass(frozen=True)
class Phase:
    """Rows of consecutive steps of one phase; `begin` counts the rows of the phases before it."""

    name: str
    begin: int
    rows: tuple[dict[str, Any], ...]

    @property
    def step(self) -> int:
        """Steps done."""
        return self.rows[-1]["step"]

    @property
    def steps(self) -> int:
        """Steps that the phase has when it is over; those done, in a round from before rows said so."""
        return self.rows[-1].get("steps", self.step)

    def last(self, keys: tuple[str, ...]) -> dict[str, float | None]:
        """The newest value of each of these that the phase has measured."""
        found: dict[str, float | None] = {}
        for row in self.rows:
            found |= {key: row[key] for key in keys if key in row}
        return found


@dataclass(frozen=True)
class Curves:
    """All of a round; `notes` hold their `at`, the number of steps (rows) taken before them."""

    phases: tuple[Phase, ...]
    notes: tuple[dict[str, Any], ...]

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the losses, the sum first, then in the order they appear."""
        known = {*PLACE, *RATES, *LIMITS}
        names = dict.fromkeys(key for phase in self.phases for row in phase.rows for key in row if key not in known)
        return tuple(sorted(names, key=lambda name: name != "loss"))

    @property
    def rows(self) -> tuple[dict[str, Any], ...]:
        return tuple(row for phase in self.phases for row in phase.rows)


def read(folder: Path) -> Curves:
    """The curves of a round folder; empty before its first step."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    steps, notes = [], []
    for line in text[: text.rfind("\n") + 1].splitlines():
        row = json.loads(line)
        if "kind" in row:
            notes.append(row | {"at": len(steps)})
        else:
            steps.append(row)
    phases, begin = [], 0
    for name, group in groupby(steps, key=lambda row: row["phase"]):
        rows = tuple(group)
        phases.append(Phase(name, begin, rows))
        begin += len(rows)
    return Curves(tuple(phases), tuple(notes))


def correcting(rows: tuple[dict[str, Any], ...]) -> list[bool]:
    """Which of a phase's rows are steps on the labelled images between two others (`burst` names the *next* one)."""
    return [False, *(row["burst"] is not None for row in rows[:-1])]
