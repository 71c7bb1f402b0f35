"""One picture of a round: its losses, rates, pseudo-labels and collapse monitors, phase by phase, as a strip chart.

Drawn from the files of the round folder alone, so it can be drawn again at any time: `python -m learner.figure ROUND_DIR`.
Knows no torch and no network; matplotlib is loaded when something is drawn, not before.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from learner.collapse import LIMITS
from learner.curves import Curves, Phase, correcting, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

INK, RED, GREY, PALE = "#1f4e79", "#b3261e", "#6b6b6b", "#eef2f7"
POINTS = 300  # of a curve: beyond that a point is the mean of several steps, and a band shows their range
FLOOR = 1e-7  # what a logarithmic strip shows as nought
STRIP, HEAD, WIDTH = 0.95, 1.25, 13.0  # inches
WORDS = {
    "lr": "learning rate",
    "momentum": "teacher momentum",
    "dino_gap": "|L_dino / ln K - 1|",
    "teacher_entropy": "teacher entropy / ln K",
    "teacher_kl": "KL(teacher || mean teacher), nats",
    "max_share": "share of the largest prototype",
    "cls_std": "deviation of CLS between films, x sqrt D",
    "centre_norm": "centre norm / sqrt K",
    "pseudo_rate": "pseudo-labels: share of (film, finding) labelled",
    "pseudo_auc": "pseudo-labels: AUC against hidden labels",
}
LOG = ("dino_gap", "teacher_kl", "cls_std", "max_share")  # where trouble is a matter of magnitude


def draw(folder: Path) -> Path:
    """Write `round.png` into a round folder and return its path; whatever the round has not measured is left blank."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = read(folder)
    left = [*curves.losses, *(key for key in ("lr", "momentum") if any(key in row for row in curves.rows))]
    quality = [key for key in ("pseudo_rate", "pseudo_auc") if any(note.get(key) is not None for note in curves.notes)]
    right = [*LIMITS, *(quality or ["pseudo_rate"])]
    tall = max(len(left), len(right), 1)
    with plt.rc_context({"font.size": 9, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY}):
        figure = plt.figure(figsize=(WIDTH, HEAD + STRIP * tall), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.03, hspace=0.0, rect=(0, 0, 1, 1 - HEAD * 0.55 / (HEAD + STRIP * tall)))  # type: ignore[union-attr]
        _title(figure, folder, curves)
        halves = figure.subfigures(1, 2)
        for half, names in zip(halves, (left, right), strict=True):
            _column(half, names, tall, curves, _prototypes(folder))
        path = folder / "round.png"
        temp = folder / ".round.png"
        figure.savefig(temp, dpi=130, format="png")
        plt.close(figure)
    temp.replace(path)
    return path


def _title(figure: Any, folder: Path, curves: Curves) -> None:
    manifest, result = _json(folder / "manifest.json"), _json(folder / "result.json")
    state = result.get("state", "unfinished")
    about = [
        f"{result[key]:,} {word}".replace(",", " ")
        for key, word in (("unlabelled", "films"), ("labelled", "of them labelled"))
        if result.get(key)
    ]
    about += [f"{len(curves.rows):,} steps".replace(",", " ")] if curves.rows else ["no step was taken"]
    about += [f"{timedelta(seconds=round(result['seconds']))} h"] if result.get("seconds") else []
    stopped = state == "stopped"
    recipe = manifest.get("recipe", {}).get("name", "")
    high = figure.get_figheight()
    figure.text(0.012, 1 - 0.16 / high, f"{manifest.get('round', folder.name)}  {recipe}: {state}", fontsize=14, va="top",
                fontweight="bold", color=RED if stopped else "black")  # fmt: skip
    figure.text(0.988, 1 - 0.2 / high, ", ".join(about), color=GREY, va="top", ha="right")
    if result.get("reason"):
        figure.text(0.012, 1 - 0.47 / high, _wrapped(result["reason"]), color=RED if stopped else GREY, va="top")


def _wrapped(text: str, width: int = 190) -> str:
    return text if len(text) <= width else text[: width - 1].rsplit(" ", 1)[0] + " ..."


def _column(half: "SubFigure", names: Sequence[str], tall: int, curves: Curves, prototypes: int | None) -> None:
    grid = half.subplots(tall, 1, sharex=True, squeeze=False)[:, 0]
    for axis, name in zip(grid, names, strict=False):
        _strip(axis, name, curves, prototypes)
    for axis in grid[len(names) :]:
        axis.set_visible(False)
    bottom = grid[len(names) - 1] if names else grid[0]
    bottom.tick_params(labelbottom=True)
    bottom.set_xlabel("optimiser steps, corrections included", color=GREY)
    for phase in curves.phases:
        words = f"{phase.name} {phase.step}/{phase.steps}"
        grid[0].annotate(words, (phase.begin, 1), xycoords=("data", "axes fraction"), xytext=(2, 3),
                         textcoords="offset points", color=INK, fontsize=9, fontweight="bold")  # fmt: skip


def _strip(axis: "Axes", name: str, curves: Curves, prototypes: int | None) -> None:
    """One named curve over all steps, the phases shaded behind it."""
    total = max(1, len(curves.rows))
    axis.set_xlim(0, total)
    for place, phase in enumerate(curves.phases):
        axis.axvspan(phase.begin, phase.begin + len(phase.rows), color=PALE if place % 2 == 0 else "white", linewidth=0)
        if phase.begin:
            axis.axvline(phase.begin, color=GREY, linewidth=0.5)
    if name in LOG:
        axis.set_yscale("log")
    shown = _notes(axis, name, curves) if name.startswith("pseudo") else _curve(axis, name, curves)
    if name in LIMITS and shown:
        _limits(axis, name)
    if name == "dino" and prototypes and shown:
        axis.axhline(math.log(prototypes), color=GREY, linewidth=0.8, linestyle=":")
        axis.annotate(f"ln K = {math.log(prototypes):.2f}", (1, math.log(prototypes)), xycoords=("axes fraction", "data"),
                      xytext=(-3, 2), textcoords="offset points", ha="right", color=GREY, fontsize=7.5)  # fmt: skip
    if not shown:
        axis.set_yticks([])
        axis.text(0.5, 0.5, _absent(name), transform=axis.transAxes, ha="center", va="center", color=GREY)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelbottom=False, labelsize=8, length=2)
    axis.set_title(WORDS.get(name, name), loc="left", fontsize=9, pad=-10, x=0.008, y=1, color="black")


def _absent(name: str) -> str:
    return "no pseudo-labels in this recipe" if name.startswith("pseudo") else "not measured in this round"


def _curve(axis: "Axes", name: str, curves: Curves) -> bool:
    """The steps' curve, and the corrections' as dots of their own; False when nothing was measured."""
    shown, ended = False, None
    for phase in curves.phases:
        corrects = correcting(phase.rows)
        x, y = _points(phase, name, corrects, False)
        if len(x):
            _line(axis, x, _positive(y, name), name)
            shown, ended = True, (x[-1], y[-1])
        x, y = _points(phase, name, corrects, True)
        if len(x):
            _, y, _, _ = _binned(x, _positive(y, name))
            axis.plot(_, y, ".", color=GREY, markersize=2.5, zorder=1)
            shown = True
    if ended and math.isfinite(ended[1]):
        axis.annotate(f"{ended[1]:.3g}", (1, 1), xycoords="axes fraction", xytext=(-3, -3), textcoords="offset points",
                      ha="right", va="top", color=_colour(name, ended[1]), fontweight="bold")  # fmt: skip
    return shown


def _points(phase: Phase, name: str, corrects: list[bool], wanted: bool) -> tuple[np.ndarray, np.ndarray]:
    kept = [
        (phase.begin + place + 0.5, row[name])
        for place, (row, is_one) in enumerate(zip(phase.rows, corrects, strict=True))
        if is_one is wanted and row.get(name) is not None
    ]
    x, y = np.array(kept, float).reshape(-1, 2).T
    return x, y


def _line(axis: "Axes", x: np.ndarray, y: np.ndarray, name: str) -> None:
    x, y, low, high = _binned(x, y)
    axis.fill_between(x, low, high, color=INK, alpha=0.18, linewidth=0)
    axis.plot(x, y, color=INK, linewidth=1.2, marker="." if len(x) == 1 else None)
    if name in LIMITS:
        beyond = np.array([not LIMITS[name].holds(value) for value in y])
        axis.plot(x[beyond], y[beyond], ".", color=RED, markersize=4)


def _binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """At most POINTS groups of neighbours: mean place, mean, least and greatest value of each."""
    groups = np.array_split(np.arange(len(x)), min(len(x), POINTS))
    pick: Callable[[Any, np.ndarray], np.ndarray] = lambda how, of: np.array([how(of[g]) for g in groups])  # noqa: E731
    return pick(np.mean, x), pick(np.mean, y), pick(np.min, y), pick(np.max, y)


def _positive(y: np.ndarray, name: str) -> np.ndarray:
    return y.clip(min=FLOOR) if name in LOG else y


def _colour(name: str, value: float) -> str:
    return RED if name in LIMITS and not LIMITS[name].holds(value) else INK


def _limits(axis: "Axes", name: str) -> None:
    """The limits as dashed lines, with everything beyond them tinted; the strip is made to show them."""
    limit = LIMITS[name]
    low, high = axis.get_ylim()
    if name not in LOG:
        low, high = -0.06, 1.06
    for edge, far in ((limit.low, -1), (limit.high, 1)):
        if math.isfinite(edge):
            low, high = (
                (min(low, edge / 5), high)
                if far < 0 and name in LOG
                else (low, max(high, edge * 1.6))
                if name in LOG
                else (low, high)
            )
            axis.axhline(edge, color=RED, linewidth=0.9, linestyle="--")
            axis.axhspan(edge, high if far > 0 else low, color=RED, alpha=0.07, linewidth=0)
    axis.set_ylim(low, high)


def _notes(axis: "Axes", name: str, curves: Curves) -> bool:
    kept = [(note["at"], note[name]) for note in curves.notes if note.get(name) is not None]
    if not kept:
        return False
    x, y = zip(*kept, strict=True)
    axis.plot(x, y, color=INK, marker="o", markersize=3.5, linewidth=1.2)
    axis.set_ylim(-0.05, 1.05)
    if name == "pseudo_auc":
        axis.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    axis.annotate(f"{y[-1]:.3g}", (1, 1), xycoords="axes fraction", xytext=(-3, -3), textcoords="offset points",
                  ha="right", va="top", color=INK, fontweight="bold")  # fmt: skip
    return True


def _prototypes(folder: Path) -> int | None:
    return _json(folder / "manifest.json").get("recipe", {}).get("prototypes")


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m learner.figure", description="Draw a round's curves again.")
    parser.add_argument("round_dir", type=Path, help="folder with metrics.jsonl")
    print(draw(parser.parse_args().round_dir))  # noqa: T201
