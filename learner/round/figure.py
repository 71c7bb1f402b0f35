"""The figure of a round: losses, rates, pseudo-labels and collapse monitors over the steps, one small plot for each.

Uses only the files of the round folder, so `python -m learner.round.figure ROUND_DIR` can draw it again at any time.
Must not import torch; imports matplotlib only when it draws.
"""

import argparse
import math
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from cxrloop.durable import read_json
from learner.round.collapse_limits import LIMITS
from learner.round.metrics_log import Curves, Phase, is_correction, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

INK, RED, GREY, PALE = "#1f4e79", "#b3261e", "#6b6b6b", "#eef2f7"
POINTS = 300  # of a curve; with more steps a point is the mean of several, and a band shows their range
FLOOR = 1e-7  # smallest value on a logarithmic axis; 0 is drawn there
STRIP, HEAD, LINE, WIDTH = 1.0, 0.6, 0.19, 13.0  # inches: height of a plot, the title, a line of the reason; page width
WRAP = 150  # characters in a line of the reason
TITLES = {
    "lr": "learning rate",
    "momentum": "momentum of the EMA teacher",
    "dino_gap": "|L_dino / ln K - 1|: 0 = all prototypes have the same probability",
    "teacher_entropy": "entropy of the teacher's output / ln K: 1 = uniform, 0 = one-hot",
    "teacher_kl": "KL(teacher || mean teacher), nats: 0 = the output does not depend on the image",
    "max_share": "share of the largest prototype: 1 = it is assigned to all images",
    "cls_std": "standard deviation of CLS between images, times sqrt D: 0 = all embeddings are equal",
    "centre_norm": "norm of the centre / sqrt K: 1 = all prototypes point in the same direction",
    "pseudo_rate": "pseudo-labels: share of (image, finding) pairs that have one",
    "pseudo_auc": "pseudo-labels: macro AUC against true labels that training does not use",
    "auc": "macro AUC on validation patients",
}
LOG = ("dino_gap", "teacher_kl", "cls_std", "max_share")  # drawn on a logarithmic axis
NO_PSEUDO, NO_MONITOR = "no pseudo-labels in this recipe", "no collapse monitors: no self-distillation in this round"


def draw(folder: Path) -> Path:
    """Draw `round.png` into a round folder, whole or not at all; return its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves, manifest, result = read(folder), read_json(folder / "manifest.json"), read_json(folder / "result.json")
    measured = {key for row in (*curves.rows, *curves.notes) for key, value in row.items() if value is not None}
    left = [*curves.losses, *(key for key in ("lr", "momentum", "auc") if key in measured)]
    right = [key for key in LIMITS if key in measured] or [NO_MONITOR]
    right += [key for key in ("pseudo_rate", "pseudo_auc") if key in measured] or [NO_PSEUDO]
    reason = fill(result.get("reason") or "", WRAP)
    head = HEAD + LINE * len(reason.splitlines())
    tall = max(len(left), len(right))
    high = head + STRIP * tall
    with plt.rc_context({"font.size": 9, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY}):
        figure = plt.figure(figsize=(WIDTH, high), layout="constrained")
        figure.get_layout_engine().set(rect=(0, 0, 1, 1 - head / high))  # type: ignore[union-attr]
        _title(figure, manifest, result, reason, len(curves.rows))
        for half, names in zip(figure.subfigures(1, 2, squeeze=False)[0], (left, right), strict=True):
            _column(half, names, tall, curves, manifest.get("recipe", {}).get("prototypes"))
        temp, path = folder / ".round.png", folder / "round.png"
        figure.savefig(temp, dpi=120, format="png")
        plt.close(figure)
    temp.replace(path)
    return path


def _title(figure: "Figure", manifest: dict[str, Any], result: dict[str, Any], reason: str, steps: int) -> None:
    """Write round, recipe and state, the reason why it stopped, and the numbers of images and steps."""
    state = result.get("state", "unfinished")
    colour = RED if state == "stopped" else "black"
    about = [f"{result[key]:,} {what}" for key, what in (("unlabelled", "images"), ("labelled", "of them labelled")) if result.get(key)]  # fmt: skip
    about += [f"{steps:,} steps" if steps else "no step was made"]
    about += [f"{timedelta(seconds=round(result['seconds']))} h"] if result.get("seconds") else []
    high = figure.get_figheight()
    name = f"{manifest.get('round', 'round')} {manifest.get('recipe', {}).get('name', '')}: {state}"
    figure.text(0.01, 1 - 0.15 / high, name, fontsize=14, fontweight="bold", va="top", color=colour)
    figure.text(0.99, 1 - 0.2 / high, ", ".join(about), color=GREY, va="top", ha="right")
    figure.text(0.01, 1 - 0.48 / high, reason, color=colour, va="top", linespacing=1.3)


def _column(half: "SubFigure", names: Sequence[str], tall: int, curves: Curves, prototypes: int | None) -> None:
    """Draw one column: the names of the phases on top, and one plot for each name below."""
    ratios = [0.22] + [1.0] * tall
    grid = half.subplots(tall + 1, 1, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    for axis in grid:
        axis.set_xlim(0, max(1, len(curves.rows)))
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelbottom=False, labelsize=8, length=2)
        for place, phase in enumerate(curves.phases):
            shade = PALE if place % 2 == 0 else "white"
            axis.axvspan(phase.begin, phase.begin + len(phase.rows), color=shade, linewidth=0, zorder=0)
    grid[0].set_yticks([])
    grid[0].set_xticks([])
    grid[0].spines[:].set_visible(False)
    for phase in curves.phases:
        wide = len(phase.rows) / max(1, len(curves.rows))
        label = f"{phase.name} {phase.step:,}/{phase.steps:,}" if wide > 0.22 else phase.name if wide > 0.07 else ""
        middle = phase.begin + len(phase.rows) / 2
        grid[0].text(middle, 0.5, label, color=INK, fontweight="bold", ha="center", va="center")
    for axis, name in zip(grid[1:], names, strict=False):
        _strip(axis, name, curves, prototypes)
    for axis in grid[len(names) + 1 :]:
        axis.set_visible(False)
    if not names:
        return
    last = grid[len(names)]
    last.tick_params(labelbottom=True)
    last.locator_params(axis="x", integer=True)
    last.set_xlabel("optimiser steps, corrections included", color=GREY)


def _strip(axis: "Axes", name: str, curves: Curves, prototypes: int | None) -> None:
    """Draw one quantity over all steps, or the text of a plot without a quantity."""
    if name in (NO_MONITOR, NO_PSEUDO):
        axis.set_yticks([])
        axis.text(0.5, 0.5, name, transform=axis.transAxes, ha="center", va="center", color=GREY)
        return
    if name in LOG:
        axis.set_yscale("log")
    else:
        axis.ticklabel_format(useOffset=False)
    newest = _notes(axis, name, curves) if any(name in note for note in curves.notes) else _curve(axis, name, curves)
    if name in LIMITS:
        _limits(axis, name)
    title = TITLES.get(name, name)
    if name == "dino" and prototypes:
        axis.axhline(math.log(prototypes), color=GREY, linewidth=0.8, linestyle=":")
        title = f"dino (dotted: ln K = {math.log(prototypes):.2f})"
    if name in curves.losses and any(True in is_correction(phase.rows) for phase in curves.phases):
        title += "; dots: corrections" if any(_points(phase, name, True)[0].size for phase in curves.phases) else ""
    axis.set_title(title, loc="left", fontsize=8.5, pad=3)
    bad = name in LIMITS and not LIMITS[name].allows(newest)
    axis.set_title(f"{newest:.3g}", loc="right", fontsize=9, pad=3, fontweight="bold", color=RED if bad else INK)


def _curve(axis: "Axes", name: str, curves: Curves) -> float:
    """Draw the steps as a curve and the corrections as dots; return the newest value."""
    newest = math.nan
    for phase in curves.phases:
        x, y, low, high = _binned(*_points(phase, name, False))
        lowest = FLOOR if name in LOG else -math.inf
        axis.fill_between(x, low.clip(lowest), high.clip(lowest), color=INK, alpha=0.18, linewidth=0)
        axis.plot(x, y.clip(lowest), color=INK, linewidth=1.2, marker="." if len(x) == 1 else None)
        if name in LIMITS:
            outside = np.array([not LIMITS[name].allows(value) for value in y], bool)
            axis.plot(x[outside], y[outside].clip(lowest), ".", color=RED, markersize=4)
        newest = y[-1] if len(y) else newest
        if name in curves.losses:
            x, y, _, _ = _binned(*_points(phase, name, True))
            axis.plot(x, y, ".", color=GREY, markersize=2.5, zorder=1)
    return newest


def _notes(axis: "Axes", name: str, curves: Curves) -> float:
    """Draw the notes between steps, values in [0, 1]; return the newest value."""
    x, y = zip(*((note["at"], note[name]) for note in curves.notes if note.get(name) is not None), strict=True)
    axis.plot(x, y, color=INK, marker="o", markersize=3.5, linewidth=1.2, clip_on=False)
    axis.set_ylim(0, 1)
    if name.endswith("auc"):
        axis.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    return y[-1]


def _points(phase: Phase, name: str, corrections: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return positions and values (n,) of a phase's steps that are corrections, or of those that are not."""
    points = [
        (phase.begin + place + 0.5, row[name])
        for place, (row, correction) in enumerate(zip(phase.rows, is_correction(phase.rows), strict=True))
        if correction is corrections and row.get(name) is not None
    ]
    x, y = np.array(points, float).reshape(-1, 2).T
    return x, y


def _binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return mean position, mean, minimum and maximum of at most POINTS groups of neighbouring points."""
    groups = np.array_split(np.arange(len(x)), min(len(x), POINTS)) if len(x) else []
    table = [(x[g].mean(), y[g].mean(), y[g].min(), y[g].max()) for g in groups]
    places, means, low, high = np.array(table, float).reshape(-1, 4).T
    return places, means, low, high


def _limits(axis: "Axes", name: str) -> None:
    """Draw the limits as dashed lines, shade the area outside, and extend the axis to show them."""
    limit = LIMITS[name]
    low, high = axis.get_ylim() if name in LOG else (-0.05, 1.05)
    if name in LOG:
        low = min(low, limit.low / 10) if math.isfinite(limit.low) else low / 1.5
        high = max(1.5 * high, limit.high * 1.5) if math.isfinite(limit.high) else 1.5 * high
    for edge, end in ((limit.low, low), (limit.high, high)):
        if math.isfinite(edge):
            axis.axhline(edge, color=RED, linewidth=0.9, linestyle="--")
            axis.axhspan(*sorted((edge, end)), color=RED, alpha=0.08, linewidth=0)
    axis.set_ylim(low, high)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m learner.round.figure", description="Draw a round's curves again.")
    parser.add_argument("round_dir", type=Path, help="folder with metrics.jsonl")
    print(draw(parser.parse_args().round_dir))  # noqa: T201
