"""Limits of the collapse monitors, and how many steps in a row a monitor may be outside its limits.

`learner.engine.collapse_monitors` computes the monitors. Must not import torch: the figure and the agent read the limits
here. The counters between steps are a dict of ints, so that a checkpoint can hold them as JSON.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

PATIENCE = 25  # steps in a row outside the limits; a dip in a small batch lasts only a few

Watch = dict[str, int]  # monitor -> steps in a row outside its limits; no entry while inside


@dataclass(frozen=True)
class Limit:
    """The allowed range of a monitor, and what a value below or above it means."""

    low: float = -math.inf
    high: float = math.inf
    below: str = ""
    above: str = ""

    def allows(self, value: float) -> bool:
        """Whether the value is inside the range."""
        return self.low <= value <= self.high


# Measured teacher_kl, in nats: collapses made on purpose (no centring; no sharpening; ten times the learning rate) fall
# below 1e-4 after 20 steps and to 1e-5 soon after; healthy rounds stay above 0.1; an untrained ViT-S has 8e-3 on chest
# phantoms and 8e-4 on grey noise, at an entropy of 0.9999. An untrained network must be inside the limits.
LIMITS = {
    "dino_gap": Limit(low=1e-5, below="L_dino is ln K: all prototypes get the same probability"),
    "teacher_entropy": Limit(1e-6, 0.99999, "the teacher's output is one-hot", "the teacher's output is uniform"),
    "teacher_kl": Limit(low=1e-4, below="the teacher's output no longer depends on the image"),
    "max_share": Limit(high=0.99, above="one prototype is assigned to all images"),
    "cls_std": Limit(low=1e-3, below="all images have the same embedding"),
    "centre_norm": Limit(high=0.9, above="all prototypes point in the same direction"),
}


def count_steps_outside(watch: Watch, monitors: Mapping[str, float]) -> Watch:
    """Return the counters after one more step; a monitor that is missing or nan keeps its counter."""
    after: Watch = {}
    for name, limit in LIMITS.items():
        value = monitors.get(name, math.nan)
        known = not math.isnan(value)
        steps = watch.get(name, 0) if not known else 0 if limit.allows(value) else watch.get(name, 0) + 1
        if steps:
            after[name] = steps
    return after


def collapse_reason(watch: Watch, monitors: Mapping[str, float]) -> str | None:
    """Return why training has collapsed: each monitor with PATIENCE steps outside, its value and limit; else None."""
    gone = [name for name, steps in watch.items() if steps >= PATIENCE]
    return (
        f"collapse: {'; '.join(_describe(name, monitors) for name in gone)} ({PATIENCE} steps in a row)"
        if gone
        else None
    )


def _describe(name: str, monitors: Mapping[str, float]) -> str:
    limit, value = LIMITS[name], monitors.get(name, math.nan)
    side = f"above {limit.high:g}, {limit.above}" if value > limit.high else f"below {limit.low:g}, {limit.below}"
    return f"{name} {value:.3g} is {side}"
