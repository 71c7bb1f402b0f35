"""When a self-distilling network has collapsed: the limits of its monitors, and how long one may lie beyond them.

Numbers by name only; how they are measured is `monitors`. Knows no torch, so that the figure and the agent read the
same limits. The memory between steps is a dict of counters, plain JSON for the checkpoint.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

PATIENCE = 25  # steps in a row beyond a limit: a passing dip of a small batch is over in a few

Watch = dict[str, int]  # monitor -> steps in a row beyond its limit; one that is within has no entry


@dataclass(frozen=True)
class Limit:
    """The range a monitor lives in, and what it means to leave it."""

    means: str
    low: float = -math.inf
    high: float = math.inf

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


# Measured: collapses made on purpose (no centring; no sharpening; ten times the learning rate) tell < 1e-4 nats after
# 20 steps and 1e-5 soon after; healthy rounds > 0.1; an untrained ViT-S 8e-3 of chest phantoms and 8e-4 of grey noise,
# at an entropy of 0.9999: a network that has only begun must stay within its limits.
LIMITS = {
    "dino_gap": Limit("L_dino stands at ln K: every prototype gets the same answer", low=1e-5),
    "teacher_entropy": Limit("the teacher's answers are all uniform, or have nothing left to sharpen", 1e-6, 0.99999),
    "teacher_kl": Limit("the teacher's answer no longer depends on the film", low=1e-4),
    "max_share": Limit("one prototype takes all films", high=0.99),
    "cls_std": Limit("all films have the same embedding", low=1e-3),
    "centre_norm": Limit("all prototypes point one way", high=0.9),
}


def count(watch: Watch, shown: Mapping[str, float]) -> Watch:
    """The watch after one more step; a monitor that is missing or nan in it says nothing, and its count stays."""
    after: Watch = {}
    for name, limit in LIMITS.items():
        value = shown.get(name, math.nan)
        known = not math.isnan(value)
        steps = watch.get(name, 0) if not known else 0 if limit.holds(value) else watch.get(name, 0) + 1
        if steps:
            after[name] = steps
    return after


def reason(watch: Watch, shown: Mapping[str, float]) -> str | None:
    """Why the run is collapsed, naming every monitor that has lost patience, its value and its limit; None when it isn't."""
    gone = [name for name, steps in watch.items() if steps >= PATIENCE]
    return f"collapse: {'; '.join(_told(name, shown) for name in gone)} ({PATIENCE} steps in a row)" if gone else None


def _told(name: str, shown: Mapping[str, float]) -> str:
    limit, value = LIMITS[name], shown.get(name, math.nan)
    side = f"above {limit.high:g}" if value > limit.high else f"below {limit.low:g}"
    return f"{name} {value:.3g} is {side}, {limit.means}"
