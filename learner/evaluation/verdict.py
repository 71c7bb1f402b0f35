"""The gate's input and output: scores, golden labels and rules; checks, the verdict and its line for people.

Frozen values, and the rule that turns checks into an outcome. Computes no statistics and reads no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

COMPARED = (
    "vs champion",
    "vs baseline",
)  # the checks that must_show is about; in the others "not enough data" is allowed
MIN_SHOWN = 30  # patients in the smaller class: below it an interval is wider than any change to act on


@dataclass(frozen=True)
class Scores:
    """Probabilities float [N, F] of one sealed bundle on the golden images; empty `findings` means those of the golden set."""

    probabilities: np.ndarray
    findings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Golden:
    """Labels float [N, F] (1, 0, nan = unknown), N patient keys, F findings."""

    labels: np.ndarray
    patients: Sequence[str]
    findings: tuple[str, ...]


@dataclass(frozen=True)
class Rules:
    """What the site requires of a candidate. Margins are absolute, so small losses of several models cannot add up."""

    margin: float = 0.02
    must_show: tuple[str, ...] = ()  # empty: every finding that candidate, champion and baseline have
    superiority_required: bool = True
    min_class: int = 100  # patients in the smaller class: below it the true level is too high (bench/learning/creep.py)
    min_shown: int = MIN_SHOWN
    parity_limit: float = 1e-3
    prevalence_factor: float = 2.0
    min_spread: float = 1e-3  # of the scores, from the 1st to the 99th percentile: less is nearly a constant


@dataclass(frozen=True)
class Check:
    """One row of a verdict; `ci` bounds the difference, each bound at the evaluation's one-sided alpha."""

    name: str
    finding: str | None
    observed: float | None
    ci: tuple[float, float] | None
    required: str
    outcome: str  # better, non_inferior, worse, inconclusive, ok, fail
    candidate: float | None = None  # its AUC, and the reference's
    reference: float | None = None
    positives: int | None = None  # patients with the finding, and without
    negatives: int | None = None
    needs: int | None = None  # more patients of the smaller class
    note: str = ""

    def __str__(self) -> str:
        what = f"{self.finding} {self.name}" if self.finding else self.name
        if self.candidate is None or self.reference is None or self.observed is None:
            seen = "" if self.observed is None else f" {self.observed:.3g}, required {self.required}"
            return f"{what}{seen}" + (f" ({self.note})" if self.note else "")
        against = self.name.removeprefix("vs ") if self.name.startswith("vs ") else "champion"
        text = f"{self.finding or 'macro'} AUC {self.candidate:.3f} vs {against} {self.reference:.3f}"
        text += f": {self.observed:+.3f}"
        if self.ci:
            text += f" [{self.ci[0]:+.3f}, {self.ci[1]:+.3f}]"
        return text + (f" ({self.note})" if self.note and self.outcome == "inconclusive" else "")


@dataclass(frozen=True)
class Verdict:
    """The outcome (passed, failed or inconclusive), its checks, and one line for people."""

    outcome: str
    checks: tuple[Check, ...]
    line: str
    alpha: float
    margin: float

    def to_json(self) -> dict[str, object]:
        """Return the verdict without `budget`, which the agent adds; numbers are finite or None."""
        return asdict(self)


def conclude(checks: Sequence[Check], must_show: Sequence[str], rules: Rules) -> tuple[str, str]:
    """Return the outcome and the line.

    Failed when any check is worse or fail; else inconclusive when a required check is; else passed.
    """
    bad = [c for c in checks if c.outcome in ("worse", "fail")]
    if bad:
        worse = f", worse than the margin {rules.margin:g}"
        return "failed", "failed: " + "; ".join(f"{c}{worse if c.outcome == 'worse' else ''}" for c in bad)
    open_rows = _once([c for c in checks if c.outcome == "inconclusive"])
    held = [c for c in open_rows if c.name == "better somewhere" or (c.name in COMPARED and c.finding in must_show)]
    if not must_show:
        return (
            "inconclusive",
            "inconclusive: candidate, champion and baseline have no finding in common with the golden set",
        )
    if held:
        return "inconclusive", "inconclusive: " + "; ".join(map(_open, held))
    line = f"passed: non-inferior to champion and baseline on {', '.join(must_show)}"
    for c in checks:
        if c.name == "better somewhere" and c.outcome == "better":
            line += f"; better on {c.note}: {c}"
    spare = [f"{c} ({c.required})" if c.ci and not c.note else str(c) for c in open_rows]
    return "passed", line + ("; INCONCLUSIVE, not required: " + "; ".join(spare) if spare else "")


def _once(rows: list[Check]) -> list[Check]:
    """Return the rows without repetitions: too few patients for one comparison are too few for the other."""
    seen: set[tuple[str | None, str]] = set()
    kept: list[Check] = []
    for c in rows:
        if not c.note or c.finding is None or (c.finding, c.note) not in seen:
            kept.append(c)
        seen.add((c.finding, c.note))
    return kept


def _open(c: Check) -> str:
    if c.name == "better somewhere":
        return f"not better than the champion on any finding: {c}"
    return f"{c}, required {c.required}" if c.ci else str(c)
