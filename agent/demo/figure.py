"""The demo's figure: AUC per night on the golden set with intervals, the frozen baseline, and a raw-pixel floor.

Drawn after the verdicts were given; it scores the same sealed bundles on the same golden films.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from agent import golden, look, rounds
from agent.site import Site
from learner.auc import NORMAL, curve, macro
from learner.floor import floor_scores

LEVEL = 0.95


def draw_nights(root: Path, nights: list[dict[str, Any]], figure: Path, say: Callable[[str], None]) -> None:
    """Write the PNG and say its numbers: macro AUC, 95 % interval (logit scale, patients as clusters)."""
    site = Site.open(root / "appliance.toml")
    with site.ledger() as ledger:
        version = golden.current(ledger)
        assert version is not None
        reference, plates = golden.films(site, ledger, version)
        first = ledger.row("SELECT * FROM bundle WHERE is_baseline = 1")
        rows = [("T=0 (baseline)", first["id"], False)] if first else []
        rows += [(f"night {n}", night["bundle"], night["poisoned"]) for n, night in enumerate(nights, 1) if night["bundle"]]
        scored = [(name, look.score(site, bundle, plates).probabilities, bad) for name, bundle, bad in rows]
        floor = _floor(site, rounds._films(site, ledger), plates, len(reference.findings))
    points = [(name, *_auc(p, reference), bad) for name, p, bad in scored]
    level = _auc(floor, reference) if floor is not None else None
    for name, value, low, high, _ in points:
        say(f"{name:15} macro AUC {value:.3f} [{low:.3f}, {high:.3f}]")
    if level:
        say(f"{'raw-pixel floor':15} macro AUC {level[0]:.3f} [{level[1]:.3f}, {level[2]:.3f}]  (24 x 24 pixels, logistic regression, same labels)")
    _plot(points, level, len(plates), figure)
