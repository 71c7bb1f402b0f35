"""The year's error budget: what evaluations have spent, what is left, and whether one is due.

A year's alpha is split evenly over `gate.evaluations_per_year`. A new golden set gives nothing back.
Spending is in `evaluation.py:_spend`.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from agent.ledger.database import Ledger, utc, when
from agent.site.site import Site

YEAR = timedelta(days=365)
ROUNDING = 1e-9  # alphas are added up in floating point: a rest below this is none


@dataclass(frozen=True)
class Budget:
    """Alpha and evaluations of the last 365 days, and what is left of both."""

    spent: float
    left: float
    evaluations_spent: int
    evaluations_left: int

    def to_json(self) -> dict[str, float]:
        """Return what a verdict prints: alpha spent and left."""
        return {"spent": self.spent, "left": self.left}


def budget(site: Site, ledger: Ledger, now: datetime) -> Budget:
    """Return the budget at `now`."""
    gate = site.config.gate
    alphas = [row["alpha"] for row in ledger.rows("SELECT alpha FROM evaluation WHERE at > ?", utc(now - YEAR))]
    rest = gate.alpha - sum(alphas)
    return Budget(
        spent=round(sum(alphas), 6),
        left=round(max(0.0, rest), 6),
        evaluations_spent=len(alphas),
        evaluations_left=max(0, gate.evaluations_per_year - len(alphas)) if rest > ROUNDING else 0,
    )


def for_status(site: Site, ledger: Ledger, now: datetime) -> dict[str, float | int]:
    """Return the section `gate` of `status`: `looks_left` (the name of version 0.1), `evaluations_left`, `alpha_left`."""
    now_left = budget(site, ledger, now)
    return {
        "looks_left": now_left.evaluations_left,
        "evaluations_left": now_left.evaluations_left,
        "alpha_left": now_left.left,
    }


def alpha_of_evaluation(site: Site) -> float:
    """Return the one-sided level of one evaluation: the year's alpha over the year's evaluations (Bonferroni)."""
    return site.config.gate.alpha / site.config.gate.evaluations_per_year


def evaluation_due(site: Site, ledger: Ledger, now: datetime) -> bool:
    """Return True when enough time has passed since the last evaluation: a year / `gate.evaluations_per_year`.

    Before the first evaluation, the time counts from the first model's deployment. False before there is a model.
    """
    last = ledger.value("SELECT max(at) FROM evaluation") or ledger.value("SELECT min(at) FROM deployment")
    return last is not None and now - when(last) >= YEAR / site.config.gate.evaluations_per_year
