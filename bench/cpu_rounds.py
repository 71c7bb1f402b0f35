"""Seconds of a first round at profile cpu over 500 phantom films, for every recipe, against its bar of ten minutes.

Each recipe runs as the agent starts it, `python -m learner ROUND_DIR` on two threads. Without --whole it is stopped when
it has run for --seconds, and every phase that has begun is extrapolated from its own steps; what hasn't begun is named
and not guessed. Timings mean nothing on a machine that does other work. Says nothing of what is learnt.

    python bench/cpu_rounds.py --whole [--backbone FILE] [--recipe NAME]... [--out bench/results/cpu_rounds.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from dicom.phantom import draw
from learner.recipe import RECIPES, resolve

FILMS, LABELLED, HELD, BAR_S = 500, 100, 40, 600.0
STOP_S = 25  # the learner promises to leave within 20
FINDINGS = ("cardiomegaly", "effusion", "opacity")


def write_plates(folder: Path, number: int) -> list[dict]:
    """Phantoms as plates (8 bit, 512 px by repetition) and their rows; labelled, unlabelled, validation, calibration."""
    rows = []
    for i, phantom in enumerate(draw(number, 0, FINDINGS, repeat=0.0)):
        pixels = phantom.pixels(256)
        np.save(folder / f"{i}.npy", (pixels >> 4).astype(np.uint8).repeat(2, 0).repeat(2, 1))
        range_ = "train" if i < FILMS else "validation" if i < FILMS + HELD else "calibration"
        known = i < LABELLED or i >= FILMS
        labels = [int(phantom.labels[name]) for name in FINDINGS] if known else [None] * len(FINDINGS)
        rows.append({"image": i, "patient": phantom.patient, "plate": f"{i}.npy", "range": range_, "labels": labels})
    return rows


def timed(folder: Path, plates: Path, rows: list[dict], recipe: str, backbone: str, seconds: float | None) -> dict:
    """One recipe's round; seconds of each phase (steps done, steps in all), and of the whole."""
    folder.mkdir()
    resolved = resolve(recipe, "cpu", {"backbone": backbone} if backbone != "random" else {})
    manifest = {
        "version": 1, "round": "r0001", "plate_version": 1, "findings": list(FINDINGS), "recipe": resolved.to_dict(),
        "seed": 0, "plates": os.path.relpath(plates, folder), "parent": None, "until": None, "films": rows,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    begun = time.monotonic()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "learner", str(folder)], cwd=Path(__file__).parents[1], stdout=log, stderr=log
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            code = process.wait(STOP_S)
    spent = time.monotonic() - begun
    if code not in (0, 75):
        raise SystemExit(f"{recipe}: exit code {code}: {(folder / 'log').read_text()[-500:]}")
    phases = read_phases(folder)
    whole = spent + sum(phase["s_per_step"] * (phase["steps"] - phase["done"]) for phase in phases.values())
    return {
        "recipe": recipe, "finished": code == 0, "ran_s": round(spent, 1), "phases": phases,
        "begun_phases_whole_s": round(whole, 1), "share_of_bar": round(whole / BAR_S, 3),
        "frozen_blocks": resolved.frozen_blocks,
    }  # fmt: skip


def read_phases(folder: Path) -> dict[str, dict]:
    """Steps done, steps in all (from the rows' own count) and seconds a step of each phase that has begun."""
    phases: dict[str, dict] = {}
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        if "steps" in row:
            phase = phases.setdefault(row["phase"], {"first": row["seconds"], "rows": 0})
            phase |= {"done": row["step"], "steps": row["steps"], "last": row["seconds"], "rows": phase["rows"] + 1}
    return {
        name: {
            "done": p["done"], "steps": p["steps"],
            "s_per_step": round((p["last"] - p["first"]) / max(1, p["rows"] - 1) * p["rows"] / max(1, p["done"]), 4),
        }
        for name, p in phases.items()
    }  # fmt: skip


def main() -> None:
    """Make the films once, run every recipe, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", action="store_true", help="every round to its end")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which a round is stopped without --whole")
    parser.add_argument("--recipe", action="append", choices=sorted(RECIPES))
    parser.add_argument("--backbone", default="random")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu_rounds.json"))
    given = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as temp:
        plates = Path(temp) / "plates"
        plates.mkdir()
        rows = write_plates(plates, FILMS + 2 * HELD)
        for name in given.recipe or sorted(RECIPES):
            limit = None if given.whole else given.seconds
            row = timed(Path(temp) / name, plates, rows, name, given.backbone, limit)
            results.append(row)
            told = "" if row["finished"] else f", of the phases begun ({', '.join(row['phases']) or 'none'})"
            seconds, share = row["begun_phases_whole_s"], row["share_of_bar"]
            if not row["finished"] and not row["phases"]:
                raise SystemExit(f"{name}: no step in {limit} s: give more --seconds, or --whole")
            print(f"{name:14} {seconds:8.0f} s  {share:5.0%} of ten minutes{told}", flush=True)
    report = {
        "films": FILMS, "labelled": LABELLED, "whole": given.whole, "pretrained": given.backbone != "random",
        "cores": os.cpu_count(), "load_before": os.getloadavg()[0], "rows": results,
    }  # fmt: skip
    given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
