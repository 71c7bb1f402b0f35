"""Experiment D: several findings of adults, few labels, an unlabelled stream, rounds T=0..3, paired draws.

    python bench/adults/experiment.py --data DIR --backbone FILE --work DIR [--labels 80 40 160] [--arms NAME ...]

DIR holds nih_adult512 (and mednist_cxr64 for --mednist); FILE is a ViT. A killed run resumes: each finished cell is a line
of adults.jsonl in the folder --results and a file of scores in the work folder, and is not run again. Scores and images
are never committed.
"""

import argparse
import fcntl
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's learner, whichever is installed

from bench.adults import arms
from bench.adults.images import FINDINGS, Adults, Division, divide, read_adults
from bench.adults.table import report
from bench.common import results
from learner.data.token_bank import TokenBank
from learner.evaluation.auc import auc
from learner.round.manifest import RoundManifest
from learner.round.recipe import Recipe, resolve
from learner.training.run import Run

DRAWS = list(range(8))
# sizes that two cores can train: 224 px, all blocks but the last frozen, two augmented views of an image
SIZES = {
    "image_size": 224, "local_size": 112, "local_views": 2, "cached_views": 2, "prototypes": 1024, "head_hidden": 256,
    "bottleneck": 64, "threads": 1, "device": "cpu", "precision": "fp32", "checkpoint_seconds": 86400, "batch": 32,
    "pos_embed": "timm",
}  # fmt: skip
LAST_BLOCK = {"blocks": 0, "blend": False, "class_hidden": 0, "components": 32, "frozen_blocks": 11}
# as published except for sizes and lengths: few steps need a faster teacher and more frequent corrections
DISTL = {
    **LAST_BLOCK, "pool": "cls", "epochs": 1, "t0_epochs": 1, "t0_lr": 1e-5, "t0_steps": 100, "lr": 3e-4, "lam": 0.5,
    "ema_base": 0.99, "correct_every": 10, "warmup_epochs": 0, "drop_path": 0.0,
}  # fmt: skip
TUNED = {
    **LAST_BLOCK, "pool": "both", "t0_lr": 1e-4, "t0_steps": 60, "lam": 0.0, "targets": "none", "label_weight": 1.0,
    "refit": "none", "average": "ema", "epochs": 1,
}  # fmt: skip
# the ladder: the default recipe with these keys changed, and what of the stream it sees
LADDER: dict[str, dict] = {
    "without the simple features": {"blend": False, "targets": "teacher", "refit": "linear"},
    "without self-distillation": {"lam": 0.0},
    "without labels in the steps": {"label_weight": 0.0},
    "without pseudo-labels": {"targets": "none", "refit": "linear"},
    "without training the network": {"lr": 1e-12, "lr_min": 0.0},
}
FROZEN = {"frozen graph": arms.frozen_graph, "pseudo-label": arms.pseudo_label}
ARMS = ["supervised only", *FROZEN, "distl", "default", "same steps, no stream", "fully labelled"]


def main(arguments: list[str] | None = None) -> None:
    """Run the missing cells, then print and write the tables."""
    parser = results.parser(__doc__)
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="default: bench/results")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--labels", type=int, nargs="*", default=[80])
    parser.add_argument("--mednist", action="store_true", help="MedNIST's images join the stream")
    parser.add_argument("--draws", type=int, nargs="*", default=DRAWS)
    parser.add_argument("--arms", nargs="*", default=ARMS, help="also the rows of the ladder")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="recipe keys to try; not recorded")
    parser.add_argument("--report", action="store_true", help="print the finished cells only")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    adults = read_adults(options.data, options.work, options.mednist)
    (options.work / "scores").mkdir(exist_ok=True)
    if not options.report:
        run_cells(options, adults)
    report(adults, options.work / "scores", options.results)


def run_cells(options: argparse.Namespace, adults: Adults) -> None:
    """Run every requested cell that has no scores yet."""
    tried = {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in options.set)}
    default = resolve("evolve", "cpu", {**SIZES, "backbone": str(options.backbone)})
    default = default.override({"frozen_blocks": -1, **tried})
    last = default.override({**LAST_BLOCK, "pool": "both", "targets": "teacher", "refit": "none"})
    places: dict[str, arms.Place] = {}

    def place(name: str, recipe: Recipe) -> arms.Place:
        if name not in places:
            bank = open_bank(adults, recipe, options.work / f"bank-{name}{'-mednist' * options.mednist}")
            places[name] = arms.Place(adults, bank, recipe, options.work / "cells")
        return places[name]

    frozen: list[arms.Frozen] = []
    for labels in options.labels:
        for seed in options.draws:
            division = divide(adults, labels, seed, options.mednist)
            for arm in options.arms:
                cell = Cell(options, adults, labels, seed, arm, division)
                if cell.finished:
                    continue
                if arm in ("supervised only", *FROZEN) and not frozen:
                    frozen.append(arms.frozen_features(place("whole", last)))
                if arm == "supervised only":
                    arms.supervised(frozen[0], division, TUNED, cell.name, cell.tell)
                elif arm in FROZEN:
                    FROZEN[arm](frozen[0], division, cell.tell)
                elif arm == "distl":
                    arms.train(place("whole", last), division, "distl", DISTL, cell.name, cell.tell)
                else:
                    lower = place("lower", default)
                    few = {"labelled": "all", "rounds": 1} if arm == "fully labelled" else {}
                    stream = arm != "same steps, no stream"
                    keys = LADDER.get(arm, {}) if arm != "default" else {}
                    arms.train(lower, division, "evolve", keys, cell.name, cell.tell, stream=stream, **few)
                cell.write()


class Cell:
    """One arm on one draw: its lines and scores."""

    def __init__(
        self, options: argparse.Namespace, adults: Adults, labels: int, seed: int, arm: str, division: Division
    ) -> None:
        self.adults, self.division, self.options = adults, division, options
        self.key = {"arm": arm, "labels": labels, "mednist": options.mednist, "draw": seed}
        self.name = "-".join(map(str, self.key.values())).replace(" ", "_").replace(",", "")
        self.lines, self.scores, self.started = [], {}, time.monotonic()

    @property
    def file(self) -> Path:
        """The scores of the cell."""
        return self.options.work / "scores" / f"{self.name}.npz"

    @property
    def finished(self) -> bool:
        """Whether an earlier run has finished this cell."""
        return self.file.exists()

    def tell(self, number: int, answers: dict[str, np.ndarray]) -> None:
        """Take the answers after round `number`."""
        truth = self.adults.truth[self.division.test].astype(float)
        by = {f: round(auc(answers["test"][:, i].astype(float), truth[:, i]), 4) for i, f in enumerate(FINDINGS)}
        known = {"validation": round(arms.validation_auc(self.adults, self.division, answers["validation"]), 4)}
        seconds = {"seconds": round(time.monotonic() - self.started, 1), "chosen": str(answers.get("chosen", ""))}
        self.lines.append(
            {**self.key, "round": number, "macro": round(float(np.mean([*by.values()])), 4), **by, **known, **seconds}
        )
        self.scores[f"test-{number}"] = answers["test"].astype(np.float32)
        print(json.dumps(self.lines[-1]), flush=True)

    def write(self) -> None:
        """Write the lines and scores; not those of a try."""
        if self.options.set:
            return
        np.savez(self.file, **self.scores)
        with (self.options.results / "adults.jsonl").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # several processes may run cells at once
            file.write("".join(json.dumps(line) + "\n" for line in self.lines))


def open_bank(adults: Adults, recipe: Recipe, folder: Path) -> TokenBank:
    """Return the tokens of all images; the product's own code makes them once."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = recipe.override({"lam": 0.5})  # with the local views, which some arms use
    work = Run(RoundManifest(folder, "bank", FINDINGS, recipe, None, None, None, adults.samples, "bank"))
    bank = work.token_bank
    work.progress.close()
    return bank


if __name__ == "__main__":
    main()
