"""How the class head is fitted in `evolve`: how sure the graph's soft labels are, and what share the labels' own fit has.

    python bench/learning/evolution_refit.py --data DIR --backbone FILE --work DIR [--shares 0.01 0.02] [--draws 16]

Experiment A of bench/learning/evolution.py at T=3 on frozen features, on draws of labelled images that the evidence doesn't use
(from 100 on), so that what is chosen here isn't chosen on them. The test patients are the same, so a choice made here is
still a choice made on the test. Prints a table and writes
bench/results/evolution_refit.json.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.learning.evolution import RESULTS, SIZES, open_bank_of
from bench.learning.evolution_arms import Banks, Frozen, Site, frozen_features
from bench.learning.evolution_images import NEAR, Draw, as_samples, draw, read_pool
from learner.data.plates import label_table
from learner.evaluation.auc import auc
from learner.objectives import head_refit, label_propagation, logistic
from learner.round.recipe import Recipe

FIRST = 100  # seed of the first draw
SHARPNESS = (1.0, 2.0, 4.0, 8.0)
OWN = (0.0, 0.25, 0.35, 0.5, 1.0)


def main() -> None:
    """Measure, print and write."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--data", type=Path, required=True)
    asked.add_argument("--backbone", type=Path, required=True)
    asked.add_argument("--work", type=Path, required=True)
    asked.add_argument("--shares", type=float, nargs="*", default=[0.01, 0.02])
    asked.add_argument("--draws", type=int, default=16)
    given = asked.parse_args()
    torch.set_num_threads(1)
    pool = read_pool(given.data, given.work, NEAR)
    recipe = Recipe().override({**SIZES, "backbone": str(given.backbone)})
    site = Site(pool, Banks([open_bank_of(pool.samples, recipe, given.work / "bank")]), recipe, given.work / "cells")
    frozen, rows = frozen_features(site), []
    for share in given.shares:
        found = [measure(site, frozen, draw(pool, "A", share, FIRST + n)) for n in range(given.draws)]
        rows += [summary(share, variant, found) for variant in found[0]]
    (RESULTS / "evolution_refit.json").write_text(json.dumps({"draws": given.draws, "rows": rows}, indent=1) + "\n")
    print("share  sharpness  own   inside  minus labels alone  worst draw  draws below  outside")
    for row in rows:
        figures = f"{row['gain']:+.4f} +- {row['error']:.4f}      {row['worst']:+.3f}      {row['below']:11.0f}  {row['outside']:.3f}"
        print(f"{row['share']:5}  {row['sharpness']:9}  {row['own']:.2f}  {row['inside']:.4f}  {figures}")


def measure(site: Site, frozen: Frozen, division: Draw) -> dict[tuple[float, float], dict[str, float]]:
    """AUC on the tests for each sharpness and share."""
    places = np.concatenate([division.labelled, *division.rounds])
    labels = label_table(
        as_samples(site.pool, division.labelled, "train", True)
        + as_samples(site.pool, places[len(division.labelled) :], "train", False)
    )
    seen, prevalence = frozen[places], head_refit.shrunk_prevalence(labels)
    own = logistic.fit(seen, labels, head_refit.FEW_PENALTY)
    said = {}
    for sharpness in SHARPNESS:
        label_propagation.SHARPNESS = sharpness
        soft = label_propagation.pseudo_labels(seen, labels, prevalence, site.recipe.neighbours, site.recipe.components)
        near = logistic.fit(seen, soft, head_refit.PENALTY)
        for share in OWN:
            head = head_refit.blend_heads(near, own, seen, share)
            said[sharpness, share] = {
                name: auc(head(frozen[at])[:, 0].numpy(), site.pool.truth[at].astype(float))
                for name, at in division.tests.items()
            }
    return said


def summary(share: float, variant: tuple[float, float], found: list[dict]) -> dict[str, float]:
    """Means over the draws of one variant, and its gain over the labels' own head (own = 1)."""
    inside = np.array([one[variant]["internal"] for one in found])
    gain = inside - [one[variant[0], 1.0]["internal"] for one in found]
    figures = {
        "inside": inside.mean(), "gain": gain.mean(), "error": gain.std(ddof=1) / len(gain) ** 0.5, "worst": gain.min(),
        "below": int((gain < 0).sum()), "outside": np.mean([one[variant]["external"] for one in found]),
    }  # fmt: skip
    return {"share": share, "sharpness": variant[0], "own": variant[1]} | {
        k: round(float(v), 5) for k, v in figures.items()
    }


if __name__ == "__main__":
    main()
