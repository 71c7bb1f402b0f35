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
    """The range a monitor lives in, and what it means to leave it on either side."""

    low: float = -math.inf
    high: float = math.inf
    below: str = ""
    above: str = ""

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


# Measured: collapses made on purpose (no centring; no sharpening; ten times the learning rate) tell < 1e-4 nats after
# 20 steps and 1e-5 soon after; healthy rounds > 0.1; an untrained ViT-S 8e-3 of chest phantoms and 8e-4 of grey noise,
# at an entropy of 0.9999: a network that has only begun must stay within its limits.
LIMITS = {
    "dino_gap": Limit(low=1e-5, below="L_dino stands at ln K: every prototype gets the same answer"),
    "teacher_entropy": Limit(1e-6, 0.99999, "nothing is left to sharpen", "the teacher's answers are uniform"),
    "teacher_kl": Limit(low=1e-4, below="the teacher's answer no longer depends on the image"),
    "max_share": Limit(high=0.99, above="one prototype takes all images"),
    "cls_std": Limit(low=1e-3, below="all images have the same embedding"),
    "centre_norm": Limit(high=0.9, above="all prototypes point one way"),
}


def count_steps_beyond(watch: Watch, shown: Mapping[str, float]) -> Watch:
    """The watch after one more step; a monitor that is missing or nan in it says nothing, and its count stays."""
    after: Watch = {}
    for name, limit in LIMITS.items():
        value = shown.get(name, math.nan)
        known = not math.isnan(value)
        steps = watch.get(name, 0) if not known else 0 if limit.holds(value) else watch.get(name, 0) + 1
        if steps:
            after[name] = steps
    return after


def collapse_reason(watch: Watch, shown: Mapping[str, float]) -> str | None:
    """Why the run is collapsed, naming every monitor that has lost patience, its value and its limit; None when it isn't."""
    gone = [name for name, steps in watch.items() if steps >= PATIENCE]
    return (
        f"collapse: {'; '.join(_describe(name, shown) for name in gone)} ({PATIENCE} steps in a row)" if gone else None
    )


def _describe(name: str, shown: Mapping[str, float]) -> str:
    limit, value = LIMITS[name], shown.get(name, math.nan)
    side = f"above {limit.high:g}, {limit.above}" if value > limit.high else f"below {limit.low:g}, {limit.below}"
    return f"{name} {value:.3g} is {side}"
