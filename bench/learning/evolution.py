"""The gain of the loop on real images: few labels, an unlabelled stream, rounds T=0..3, paired draws.

    python bench/learning/evolution.py --data DIR --backbone FILE --work DIR [--experiment A B C] [--shares 0.01 0.02]

A: children's images, 1 and 2 % labelled. B: 80 labelled images of adults at 64 px, another hospital's stream. C: as A,
and B's stream joins from T=2 on (drift). D: several findings of adults; bench/adults/experiment.py, which it runs, has more
options. DIR holds kermany224, nih1000_64, mednist_cxr64 and nih_adult512; FILE is a ViT in timm's key names. A killed run
resumes: each finished cell is a line of evolution.jsonl in the folder --results and is not run again. The work folder
keeps the scores of each cell, for the intervals. Scores and images are never committed.
"""

import argparse
import fcntl
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's learner, whichever is installed

from bench.adults import experiment as adults
from bench.common import results
from bench.learning.evolution_arms import (
    Banks,
    Frozen,
    Scores,
    Site,
    frozen_features,
    frozen_graph,
    fully_labelled,
    learn,
    pseudo_label,
    supervised,
)
from bench.learning.evolution_images import FAR, NEAR, Draw, draw, read_pool
from bench.learning.evolution_table import report
from bench.learning.floor_of_images import pixel_floor, view_floor
from learner.data.token_bank import TokenBank
from learner.evaluation.auc import auc
from learner.round.manifest import RoundManifest, Sample
from learner.round.recipe import Recipe
from learner.training.run import Run

DRAWS = list(range(8))
# Sizes that two cores can train: ViT-S/14 at 140 px, eleven of its twelve blocks frozen, two augmented views of an image.
SIZES = {
    "image_size": 140, "local_size": 70, "local_views": 2, "cached_views": 2, "frozen_blocks": 11, "mean": 0.45,
    "std": 0.226, "pos_embed": "timm", "prototypes": 1024, "head_hidden": 256, "bottleneck": 64, "class_hidden": 0,
    "pool": "both", "components": 32, "threads": 1, "device": "cpu", "precision": "bf16", "rotate": 10.0, "global_scale": (0.7, 1.0),
    "global_noise": 0.2, "local_noise": 0.3, "checkpoint_seconds": 86400, "drop_path": 0.0, "batch": 32, "epochs": 1,
    "t0_epochs": 1, "warmup_epochs": 0,
}  # fmt: skip
EVOLVE = {
    "t0_lr": 1e-6, "lr": 1e-4, "lam": 0.0, "ema_base": 0.99, "targets": "teacher", "label_weight": 0.0,
    "refit": "graph", "average": "trained",
}  # fmt: skip
# As published except for sizes and lengths: few steps need a faster teacher and more frequent corrections.
DISTL = {"pool": "cls", "t0_lr": 1e-3, "t0_steps": 100, "lr": 3e-4, "lam": 0.5, "ema_base": 0.99, "correct_every": 10}
_PLAIN = {"average": "ema", "replay": 0.0, "refit": "linear"}
# Trained by the product's recipes: the two recipes, then each without one of its signals, then with another seed.
TRAINED = {
    "distl": ("distl", DISTL),
    "evolve": ("evolve", EVOLVE),
    "distl, no correction": ("distl", {**DISTL, "correct_every": 0}),
    "distl, self-training only": ("distl", {**DISTL, "correct_every": 0, "lam": 0.0}),
    "distl, self-supervised only": ("distl", {**DISTL, "correct_every": 0, "lam": 1.0}),
    "same steps, no stream": ("evolve", {**EVOLVE, **_PLAIN, "targets": "none", "label_weight": 1.0}),
    "distl, another seed": ("distl", {**DISTL, "seed": 1}),
    "evolve, another seed": ("evolve", {**EVOLVE, "seed": 1}),
}
FROZEN: dict[str, Callable] = {
    "supervised only": supervised,
    "fully labelled": fully_labelled,
    "frozen graph": frozen_graph,
    "pseudo-label": pseudo_label,
}
# The ladder: the value of each part of `evolve` and of further parts; each is `evolve` with these keys changed.
LADDER = {
    "labels only, same steps": {**_PLAIN, "targets": "none", "label_weight": 1.0},
    "+ teacher's answers": {**_PLAIN, "label_weight": 1.0},
    "+ labels in the head's fit alone": _PLAIN,
    "+ neighbours in the head": {"average": "ema"},
    "whole": {},
    "with labels in every step": {"label_weight": 1.0},
    "with DINO": {"lam": 0.5},
    "with KoLeo": {"koleo": 0.1},
    "with an anchor": {"replay": 0.25},
    "graph's answers instead": {"targets": "graph"},
}


def main() -> None:
    """Run the missing cells, then print and write the tables."""
    parser = results.parser(__doc__)
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="default: bench/results")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--cells", type=Path, help="folder of running rounds; default: WORK/cells; faster on a memory disk"
    )
    parser.add_argument("--experiment", nargs="*", choices=("A", "B", "C", "D"), default=["A", "B", "C"])
    parser.add_argument("--shares", type=float, nargs="*", default=[0.01, 0.02])
    parser.add_argument("--draws", type=int, nargs="*", default=DRAWS)
    parser.add_argument("--arms", nargs="*", default=[*FROZEN, *TRAINED])
    parser.add_argument("--ladder", action="store_true", help="the ablation ladder (A, T=1), instead of the arms")
    parser.add_argument("--report", action="store_true", help="print and draw the finished cells only")
    options = parser.parse_args()
    if options.experiment == ["D"]:
        adults.main(adults_arguments(options))
        return
    torch.set_num_threads(1)
    whole = pool = read_pool(options.data, options.work, NEAR + FAR)
    recipe = Recipe().override({**SIZES, "backbone": str(options.backbone)})
    scores = options.work / "scores"
    scores.mkdir(exist_ok=True)
    if not options.report:
        near = sum(sample.plate.name.startswith(NEAR) for sample in pool.samples)
        banks = [open_bank_of(pool.samples[:near], recipe, options.work / "bank")]
        if set(options.experiment) & {"B", "C"}:
            banks.append(open_bank_of(pool.samples[near:], recipe, options.work / "bank_far"))
        pool = pool.first(sum(len(bank.row) for bank in banks))
        site = Site(pool, Banks(banks), recipe, options.cells or options.work / "cells")
        frozen = frozen_features(site)
        for experiment, share in requested(options):
            for seed in options.draws:
                division = draw(pool, experiment, share, seed)
                for arm in list(LADDER) if options.ladder else options.arms:
                    run_cell(
                        site,
                        frozen,
                        division,
                        "ladder" if options.ladder else experiment,
                        arm,
                        share,
                        seed,
                        scores,
                        options.results,
                    )
        floors_file = options.work / "floors.json"
        before = json.loads(floors_file.read_text())["pixels"] if floors_file.exists() else {}
        missing = [pair for pair in requested(options) if "{} {}".format(*pair) not in before]
        floors = {"pixels": before | pixel_floor(pool, missing, DRAWS), "view": view_floor(options.data)}
        floors_file.write_text(json.dumps(floors, indent=1) + "\n")
    report(whole, scores, options.results, options.work / "floors.json")


def adults_arguments(options: argparse.Namespace) -> list[str]:
    """Return the options of experiment D, which has images, findings and arms of its own."""
    places = ("data", "backbone", "work", "results")
    named = [word for name in places for word in (f"--{name}", str(getattr(options, name)))]
    return [*named, "--draws", *map(str, options.draws), *(["--report"] if options.report else [])]


def requested(options: argparse.Namespace) -> list[tuple[str, float]]:
    """Return experiments with their shares of labelled images; B has one number of images, C the first share."""
    shares = {"A": options.shares, "B": [0.0], "C": options.shares[:1]}
    return [
        (experiment, share)
        for experiment in (["A"] if options.ladder else options.experiment)
        for share in shares[experiment]
    ]


def open_bank_of(samples: tuple[Sample, ...], recipe: Recipe, folder: Path) -> TokenBank:
    """Return the tokens of these images; the product's own code makes them once."""
    folder.mkdir(parents=True, exist_ok=True)
    work = Run(RoundManifest(folder, "bank", ("abnormal",), recipe, None, None, None, samples, "bank"))
    bank = work.token_bank
    work.progress.close()
    return bank


def run_cell(
    site: Site,
    frozen: Frozen,
    division: Draw,
    experiment: str,
    arm: str,
    share: float,
    seed: int,
    scores: Path,
    results_folder: Path,
) -> None:
    """Run one arm on one draw unless it is finished; append one line for each round."""
    name = f"{experiment}-{arm}-{share}-{seed}".replace(" ", "_").replace("/", "_")
    if (scores / f"{name}.npz").exists():
        return
    started, lines, kept = time.monotonic(), [], {}

    def tell(number: int, by_test: Scores) -> None:
        truth = site.pool.truth
        places = division.tests | {"validation": division.validation}
        measured = {k: round(auc(by_test[k].astype(float), truth[at].astype(float)), 5) for k, at in places.items()}
        chosen = str(by_test.get("chosen", ""))
        labelled, arrived = len(division.labelled), sum(len(r) for r in division.rounds[:number])
        lines.append(
            {"experiment": experiment, "arm": arm, "share": share, "draw": seed, "round": number,
             **measured, "chosen": chosen, "labelled": labelled, "unlabelled": arrived,
             "seconds": round(time.monotonic() - started, 1)}
        )  # fmt: skip
        kept.update({f"{k}-{number}": by_test[k].astype(np.float32) for k in division.tests})
        print(json.dumps(lines[-1]), flush=True)

    if experiment == "ladder":
        learn(site, division, "evolve", {**EVOLVE, **LADDER[arm]}, name, tell, rounds=1)
    elif arm in TRAINED:
        learn(site, division, *TRAINED[arm], name, tell)
    else:
        FROZEN[arm](site, frozen, division, tell)
    np.savez(scores / f"{name}.npz", **kept)
    with (results_folder / "evolution.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # several processes may run cells at once
        file.write("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
