"""Seconds of a first round at profile cpu over 500 phantom images, for every recipe, against the bar of ten minutes.

With --whole each recipe runs as the agent starts it, `python -m learner ROUND_DIR` on two threads. Without it, each
phase runs its first steps in this process and the rest is extrapolated; packing, tokens, choices and exports run in
full. On a busy machine only the CPU seconds are meaningful. It does not measure what a round learns.

    python bench/learning/cpu_rounds.py --whole [--backbone FILE] [--recipe NAME]... [--out bench/results/cpu_rounds.json]
"""

from __future__ import annotations

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

from bench.common import machine, results
from bench.common.appliance import ROOT
from dicom.phantom.phantom import draw
from learner.engine.optim import Schedule
from learner.engine.step import Losses, State, StepFunction
from learner.networks.architecture import Plan
from learner.round.manifest import load
from learner.round.recipe import RECIPES, Recipe, resolve
from learner.training.run import Run

SAMPLES, LABELLED, HELD, BAR_S = 500, 100, 40, 600.0
LEAST = 8  # steps run of each phase; the first is slower than the others
FINDINGS = ("cardiomegaly", "effusion", "opacity")


def write_plates(folder: Path, samples: int) -> list[dict]:
    """Write phantoms as plates (8 bit, 512 px by repetition); return their manifest rows, of every range."""
    rows = []
    for i, phantom in enumerate(draw(samples + 2 * HELD, 0, FINDINGS, repeat=0.0)):
        pixels = phantom.pixels(256)
        np.save(folder / f"{i}.npy", (pixels >> 4).astype(np.uint8).repeat(2, 0).repeat(2, 1))
        range_ = "train" if i < samples else "validation" if i < samples + HELD else "calibration"
        known = i < samples * LABELLED // SAMPLES or i >= samples
        labels = [int(phantom.labels[name]) for name in FINDINGS] if known else [None] * len(FINDINGS)
        rows.append({"image": i, "patient": phantom.patient, "plate": f"{i}.npy", "range": range_, "labels": labels})
    return rows


def write_round(folder: Path, plates: Path, rows: list[dict], recipe: str, backbone: str) -> Recipe:
    """Write a round folder of these images; return its recipe as the agent resolves it."""
    folder.mkdir()
    resolved = resolve(recipe, "cpu", {"backbone": backbone} if backbone != "random" else {})
    manifest = {
        "version": 2, "round": "r0001", "plate_version": 1, "findings": list(FINDINGS), "recipe": resolved.to_dict(),
        "seed": 0, "plates": os.path.relpath(plates, folder), "parent": None, "until": None, "images": rows,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return resolved


def clock() -> np.ndarray:
    """Return the seconds of the wall clock and the CPU seconds of this process and its children."""
    return np.array([time.monotonic(), machine.cpu_seconds()])


def run_whole(folder: Path) -> np.ndarray:
    """Run a round in its own process; return its seconds as `clock` does."""
    began = clock()
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "learner", str(folder)]
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log).returncode
    if code:
        raise SystemExit(f"{folder.name}: exit code {code}: {(folder / 'log').read_text()[-500:]}")
    return clock() - began


class Short(Run):
    """A run of the first steps of each phase that measures them; everything between the phases runs in full."""

    def __init__(self, folder: Path) -> None:
        super().__init__(load(folder))
        self.phases: dict[str, dict[str, int]] = {}
        self.skipped = np.zeros(2)  # estimated seconds of the skipped steps, as `clock` does

    def train_phase(
        self,
        phase: str,
        schedule: Schedule,
        start: Callable[[State], None],
        step: StepFunction,
        plan: Plan | None = None,
    ) -> State:
        """Run the phase's first epoch, at least LEAST steps; the rest is estimated from all of them but the first."""
        done, spent = min(schedule.steps, max(LEAST, schedule.steps_per_epoch)), []

        def timed(state: State) -> Losses:
            began = clock()
            losses = step(state)
            spent.append(clock() - began)
            return losses

        state = super().train_phase(phase, replace(schedule, lr=schedule.lr[:done]), start, timed, plan)
        ticks = spent[1:] or spent
        self.skipped += np.sum(ticks, 0) * (schedule.steps - done) / max(1, done - 1)
        self.phases[phase] = {"done": done, "steps": schedule.steps}
        return state


def run_short(folder: Path) -> tuple[np.ndarray, dict[str, dict[str, int]]]:
    """Return the estimated seconds of the whole round, and the steps of each phase."""
    began = clock()
    run = Short(folder)
    try:
        method = run.recipe.method.replace("-", "_")
        importlib.import_module(f"learner.recipes.{method}").train(run)
    finally:
        run.progress.close()
    return clock() - began + run.skipped, run.phases


def main() -> None:
    """Make the images once, run every recipe, print and write."""
    parser = results.parser(__doc__, "cpu_rounds.json")
    parser.add_argument("--whole", action="store_true", help="every round to its end, in its own process")
    parser.add_argument("--images", type=int, default=SAMPLES, help="train images; the bar is for 500")
    parser.add_argument("--recipe", action="append", choices=sorted(RECIPES))
    parser.add_argument("--backbone", default="random")
    options = parser.parse_args()
    report_rows, before = [], machine.facts()
    with tempfile.TemporaryDirectory() as temp:
        plates = Path(temp) / "plates"
        plates.mkdir()
        rows = write_plates(plates, options.images)
        for name in options.recipe or sorted(RECIPES):
            resolved = write_round(Path(temp) / name, plates, rows, name, options.backbone)
            seconds, phases = (run_whole(Path(temp) / name), {}) if options.whole else run_short(Path(temp) / name)
            share = round(seconds[0] / BAR_S, 3)
            report_rows.append({
                "recipe": name, "s": round(seconds[0], 1), "cpu_s": round(seconds[1], 1), "share_of_bar": share,
                "steps": phases, "frozen_blocks": resolved.frozen_blocks,
            })  # fmt: skip
            how = "" if options.whole else f" (extrapolated from the first steps of {', '.join(phases)})"
            print(
                f"{name:14} {seconds[0]:8.0f} s  {share:5.0%} of ten minutes, {seconds[1]:.0f} CPU s{how}",
                flush=True,
            )
    report = {
        "images": options.images, "labelled": options.images * LABELLED // SAMPLES, "whole": options.whole,
        "pretrained": options.backbone != "random", "machine": before, "rows": report_rows,
    }  # fmt: skip
    results.write(options.out, report)


if __name__ == "__main__":
    main()
