"""Seconds of a first round at profile cpu over 500 phantom images, for every recipe, against its bar of ten minutes.

With --whole each recipe runs as the agent starts it, `python -m learner ROUND_DIR` on two threads. Without it, each phase
takes its first steps in this process and the others are extrapolated; packing, tokens, choices and exports happen in
full. On a machine that does other work only the processors' seconds mean something. Says nothing of what is learnt.

    python bench/learning/cpu_rounds.py --whole [--backbone FILE] [--recipe NAME]... [--out bench/results/cpu_rounds.json]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dicom.phantom.phantom import draw
from learner.engine.optim import Schedule
from learner.engine.step import Losses, State, StepFunction
from learner.networks.architecture import Plan
from learner.round.manifest import load
from learner.round.recipe import RECIPES, Recipe, resolve
from learner.training.run import Run

SAMPLES, LABELLED, HELD, BAR_S = 500, 100, 40, 600.0
LEAST = 8  # steps of a phase that are run: the first is slower than the others
FINDINGS = ("cardiomegaly", "effusion", "opacity")


def write_plates(folder: Path, samples: int) -> list[dict]:
    """Phantoms as plates (8 bit, 512 px by repetition) and their rows; labelled, unlabelled, validation, calibration."""
    rows = []
    for i, phantom in enumerate(draw(samples + 2 * HELD, 0, FINDINGS, repeat=0.0)):
        pixels = phantom.pixels(256)
        np.save(folder / f"{i}.npy", (pixels >> 4).astype(np.uint8).repeat(2, 0).repeat(2, 1))
        range_ = "train" if i < samples else "validation" if i < samples + HELD else "calibration"
        known = i < samples * LABELLED // SAMPLES or i >= samples
        labels = [int(phantom.labels[name]) for name in FINDINGS] if known else [None] * len(FINDINGS)
        rows.append({"image": i, "patient": phantom.patient, "plate": f"{i}.npy", "range": range_, "labels": labels})
    return rows


def made(folder: Path, plates: Path, rows: list[dict], recipe: str, backbone: str) -> Recipe:
    """A round folder of these images; its recipe as the agent would resolve it."""
    folder.mkdir()
    resolved = resolve(recipe, "cpu", {"backbone": backbone} if backbone != "random" else {})
    manifest = {
        "version": 2, "round": "r0001", "plate_version": 1, "findings": list(FINDINGS), "recipe": resolved.to_dict(),
        "seed": 0, "plates": os.path.relpath(plates, folder), "parent": None, "until": None, "images": rows,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return resolved


def clock() -> np.ndarray:
    """Seconds on the wall, and of the processors in this process and its children."""
    return np.array([time.monotonic(), sum(os.times()[:4])])


def whole(folder: Path) -> np.ndarray:
    """Seconds of the round from the start of its process to its end."""
    begun = clock()
    with (folder / "log").open("w") as log:
        words = [sys.executable, "-m", "learner", str(folder)]
        code = subprocess.run(words, cwd=Path(__file__).resolve().parents[2], stdout=log, stderr=log).returncode
    if code:
        raise SystemExit(f"{folder.name}: exit code {code}: {(folder / 'log').read_text()[-500:]}")
    return clock() - begun


class Short(Run):
    """A run that takes the first steps of each phase, and notes what they took; all between the phases happens in full."""

    def __init__(self, folder: Path) -> None:
        super().__init__(load(folder))
        self.phases: dict[str, dict[str, int]] = {}
        self.left = np.zeros(2)  # seconds of the steps that were left out

    def train_phase(
        self,
        phase: str,
        schedule: Schedule,
        start: Callable[[State], None],
        step: StepFunction,
        plan: Plan | None = None,
    ) -> State:
        """The phase's first epoch, LEAST steps or more; the others take as long as these but the first, which is slower."""
        done, spent = min(schedule.steps, max(LEAST, schedule.steps_per_epoch)), []

        def timed(state: State) -> Losses:
            begun = clock()
            losses = step(state)
            spent.append(clock() - begun)
            return losses

        state = super().train_phase(phase, replace(schedule, lr=schedule.lr[:done]), start, timed, plan)
        ticks = spent[1:] or spent  # a step with its correction is several
        self.left += np.sum(ticks, 0) * (schedule.steps - done) / max(1, done - 1)
        self.phases[phase] = {"done": done, "steps": schedule.steps}
        return state


def extrapolated(folder: Path) -> tuple[np.ndarray, dict[str, dict[str, int]]]:
    """Seconds the whole round would take, from the first steps of each phase; the phases' steps."""
    begun = clock()
    run = Short(folder)
    try:
        method = run.recipe.method.replace("-", "_")
        importlib.import_module(f"learner.recipes.{method}").train(run)
    finally:
        run.progress.close()
    return clock() - begun + run.left, run.phases


def main() -> None:
    """Make the images once, run every recipe, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", action="store_true", help="every round to its end, in its own process")
    parser.add_argument("--images", type=int, default=SAMPLES, help="train images; the bar is for 500")
    parser.add_argument("--recipe", action="append", choices=sorted(RECIPES))
    parser.add_argument("--backbone", default="random")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu_rounds.json"))
    given = parser.parse_args()
    results, load_before = [], os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temp:
        plates = Path(temp) / "plates"
        plates.mkdir()
        rows = write_plates(plates, given.samples)
        for name in given.recipe or sorted(RECIPES):
            resolved = made(Path(temp) / name, plates, rows, name, given.backbone)
            seconds, phases = (whole(Path(temp) / name), {}) if given.whole else extrapolated(Path(temp) / name)
            share = round(seconds[0] / BAR_S, 3)
            results.append({
                "recipe": name, "s": round(seconds[0], 1), "cpu_s": round(seconds[1], 1), "share_of_bar": share,
                "steps": phases, "frozen_blocks": resolved.frozen_blocks,
            })  # fmt: skip
            told = "" if given.whole else f" (extrapolated from the first steps of {', '.join(phases)})"
            print(
                f"{name:14} {seconds[0]:8.0f} s  {share:5.0%} of ten minutes, {seconds[1]:.0f} s of processors{told}",
                flush=True,
            )
    report = {
        "images": given.samples, "labelled": given.samples * LABELLED // SAMPLES, "whole": given.whole,
        "pretrained": given.backbone != "random", "cores": os.cpu_count(), "load_before": load_before, "rows": results,
    }  # fmt: skip
    given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
