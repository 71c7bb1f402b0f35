"""Reader of metrics.jsonl: the steps of a round by phase, and the notes between them.

Leaves out a last line that the learner is still writing. Must not import torch.
"""

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from learner.round.collapse_limits import LIMITS

PLACE = ("kind", "phase", "step", "steps", "burst", "seconds")  # keys that locate a row; not measurements
RATES = ("lr", "momentum")  # of a step, from the schedules


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
        """Steps of the whole phase; in rounds of older versions, whose rows have no `steps`, the steps done."""
        return self.rows[-1].get("steps", self.step)

    def last(self, keys: tuple[str, ...]) -> dict[str, float | None]:
        """Return the newest value of each key that the phase has measured."""
        values: dict[str, float | None] = {}
        for row in self.rows:
            values |= {key: row[key] for key in keys if key in row}
        return values


@dataclass(frozen=True)
class Curves:
    """All metrics of a round; each note has `at`, the number of step rows before it."""

    phases: tuple[Phase, ...]
    notes: tuple[dict[str, Any], ...]

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the losses: the total first, then in order of appearance."""
        known = {*PLACE, *RATES, *LIMITS}
        names = dict.fromkeys(key for phase in self.phases for row in phase.rows for key in row if key not in known)
        return tuple(sorted(names, key=lambda name: name != "loss"))

    @property
    def rows(self) -> tuple[dict[str, Any], ...]:
        """The step rows of all phases."""
        return tuple(row for phase in self.phases for row in phase.rows)


def read(folder: Path) -> Curves:
    """Return the metrics of a round folder; empty before the first step."""
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


def is_correction(rows: tuple[dict[str, Any], ...]) -> list[bool]:
    """Return for each row of a phase whether it is a correction step; a row's `burst` is about the *next* step."""
    return [False, *(row["burst"] is not None for row in rows[:-1])]
