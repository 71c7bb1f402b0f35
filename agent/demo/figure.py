"""The demo's figure: AUC per night on the golden set with intervals, the frozen baseline, and a raw-pixel model.

Drawn after all verdicts, from the same sealed bundles and the same golden images.
"""

import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from agent.ledger.database import Ledger
from agent.rounds import evaluation, golden_set, planning
from agent.site.site import Site
from learner.evaluation.auc import NORMAL, curve, macro
from learner.evaluation.gate import Golden
from learner.evaluation.pixel_baseline import fit, thumbnails

LEVEL = 0.95
INK, RED, GREY = "#1f4e79", "#b3261e", "#6b6b6b"


def draw_nights(root: Path, nights: list[dict[str, Any]], figure: Path, say: Callable[[str], None]) -> None:
    """Write the PNG and print its numbers: macro AUC with a 95 % interval (logit scale, patients as clusters)."""
    site = Site.open(root / "appliance.toml")
    with site.ledger() as ledger:
        version = golden_set.current(ledger)
        if version is None:
            return say("No figure: no golden set was frozen.")
        reference, plates = golden_set.load(site, ledger, version)
        first = ledger.row("SELECT * FROM bundle WHERE is_baseline = 1")
        rows = [("T=0", first["id"], "baseline", False)] if first else []
        rows += [
            (f"night {number}", night["bundle"], night["state"], night["poisoned"])
            for number, night in enumerate(nights, 1)
            if night["bundle"]
        ]
        points = [
            (
                f"{name}\n{state}" + ("\n(poisoned)" if poisoned else ""),
                *estimate(evaluation.score(site, bundle, plates).probabilities, reference),
                poisoned,
            )
            for name, bundle, state, poisoned in rows
        ]
        floor = estimate(raw_pixels(site, ledger, plates), reference)
    for name, value, low, high, _ in points:
        say(
            f"  {name.replace(chr(10) + '(', ' (').replace(chr(10), ', '):36} macro AUC {value:.3f} [{low:.3f}, {high:.3f}]"
        )
    name, (value, low, high) = "logistic regression on raw pixels", floor
    say(f"  {name:36} macro AUC {value:.3f} [{low:.3f}, {high:.3f}]")
    _plot(points, floor, len(plates), figure)


def estimate(probabilities: np.ndarray, reference: Golden) -> tuple[float, float, float]:
    """Return macro AUC and its interval; nan without a finding that has two patients of each class."""
    _, patient = np.unique(np.asarray(reference.patients), return_inverse=True)
    curves = []
    for place in range(len(reference.findings)):
        label = reference.labels[:, place]
        known = ~np.isnan(label)
        if all(len(set(patient[known & (label == value)])) >= 2 for value in (0, 1)):
            curves.append(curve(probabilities[known, place], label[known], patient[known], int(patient.max()) + 1))
    if not curves:
        return math.nan, math.nan, math.nan
    mean = macro(curves)
    centre = math.log(mean.level / (1 - mean.level))
    half = NORMAL.inv_cdf(0.5 + LEVEL / 2) * math.sqrt(mean.variance) / (mean.level * (1 - mean.level))
    low, high = (1 / (1 + math.exp(-(centre + side * half))) for side in (-1, 1))
    return mean.value, low, high


def raw_pixels(site: Site, ledger: Ledger, plates: list[str]) -> np.ndarray:
    """Return probabilities of a logistic regression on 24 x 24 pixels, trained with the labels that the learner had."""
    train = [
        image
        for image in planning.training_images(site, ledger, datetime.now(UTC))
        if image["range"] == "train" and any(value is not None for value in image["labels"])
    ]
    labels = np.array([[np.nan if v is None else v for v in image["labels"]] for image in train], float)
    model = fit(thumbnails(np.stack([site.store.plate(image["plate"]) for image in train])), labels)
    return model.scores(thumbnails(np.stack([site.store.plate(plate) for plate in plates])))


def _plot(points: list[tuple], floor: tuple[float, float, float], images: int, figure: Path) -> None:
    drawing, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    if points:
        axis.axhline(points[0][1], color=INK, linewidth=1, linestyle="--", label="frozen baseline (T=0)")
    axis.axhspan(floor[1], floor[2], color=GREY, alpha=0.15, linewidth=0)
    axis.axhline(floor[0], color=GREY, linewidth=1, linestyle=":", label="logistic regression on raw pixels")
    for place, (_, value, low, high, poisoned) in enumerate(points):
        colour = RED if poisoned else INK
        axis.errorbar(place, value, [[value - low], [high - value]], fmt="o", color=colour, capsize=4, markersize=7)
        axis.annotate(f"{value:.3f}", (place, value), textcoords="offset points", xytext=(9, 5), color=colour)
    axis.set_xticks(range(len(points)), [point[0] for point in points])
    axis.set_xlim(-0.5, len(points) - 0.3)
    axis.set_ylabel("macro AUC, 95 % interval")
    axis.set_title(f"The model after each night, on {images} golden images", loc="left", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right", fontsize=9)
    drawing.savefig(figure, dpi=150)
    plt.close(drawing)
