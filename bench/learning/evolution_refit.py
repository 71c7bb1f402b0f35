"""The fit of the class head in `evolve`: sharpness of the graph's soft labels, and the share of the labels' own fit.

    python bench/learning/evolution_refit.py --data DIR --backbone FILE --work DIR [--shares 0.01 0.02] [--draws 16]

Experiment A of bench/learning/evolution.py at T=3 on frozen features. Its draws of labelled images start at 100; the
evidence uses others, so nothing is chosen on them. The test patients are the same: a choice made here is still a choice
made on the test.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.common import results
from bench.learning.evolution import SIZES, open_bank_of
from bench.learning.evolution_arms import Banks, Frozen, Site, frozen_features
from bench.learning.evolution_images import NEAR, Draw, as_samples, draw, read_pool
from learner.data.plates import label_table
from learner.evaluation.auc import auc
from learner.fits import head_refit, label_propagation, logistic
from learner.round.recipe import Recipe

FIRST = 100  # seed of the first draw
SHARPNESS = (1.0, 2.0, 4.0, 8.0)
OWN = (0.0, 0.25, 0.35, 0.5, 1.0)


def main() -> None:
    """Measure, print and write."""
    parser = results.parser(__doc__, "evolution_refit.json")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.01, 0.02])
    parser.add_argument("--draws", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pool = read_pool(options.data, options.work, NEAR)
    recipe = Recipe().override({**SIZES, "backbone": str(options.backbone)})
    site = Site(
        pool, Banks([open_bank_of(pool.samples, recipe, options.work / "bank")]), recipe, options.work / "cells"
    )
    frozen, rows = frozen_features(site), []
    for share in options.shares:
        aucs = [measure(site, frozen, draw(pool, "A", share, FIRST + n)) for n in range(options.draws)]
        rows += [summary(share, variant, aucs) for variant in aucs[0]]
    results.write(options.out, {"draws": options.draws, "rows": rows})
    print("share  sharpness  own   inside  minus labels alone  worst draw  draws below  outside")
    for row in rows:
        figures = f"{row['gain']:+.4f} +- {row['error']:.4f}      {row['worst']:+.3f}      {row['below']:11.0f}  {row['outside']:.3f}"
        print(f"{row['share']:5}  {row['sharpness']:9}  {row['own']:.2f}  {row['inside']:.4f}  {figures}")


def measure(site: Site, frozen: Frozen, division: Draw) -> dict[tuple[float, float], dict[str, float]]:
    """Return the AUC on the tests for each (sharpness, share)."""
    places = np.concatenate([division.labelled, *division.rounds])
    labels = label_table(
        as_samples(site.pool, division.labelled, "train", True)
        + as_samples(site.pool, places[len(division.labelled) :], "train", False)
    )
    seen, prevalence = frozen[places], head_refit.shrunk_prevalence(labels)
    own = logistic.fit(seen, labels, head_refit.FEW_PENALTY)
    aucs = {}
    for sharpness in SHARPNESS:
        label_propagation.SHARPNESS = sharpness
        soft = label_propagation.pseudo_labels(seen, labels, prevalence, site.recipe.neighbours, site.recipe.components)
        near = logistic.fit(seen, soft, head_refit.PENALTY)
        for share in OWN:
            head = head_refit.blend_heads(near, own, seen, share)
            aucs[sharpness, share] = {
                name: auc(head(frozen[at])[:, 0].numpy(), site.pool.truth[at].astype(float))
                for name, at in division.tests.items()
            }
    return aucs


def summary(share: float, variant: tuple[float, float], aucs: list[dict]) -> dict[str, float]:
    """Return means over the draws of one variant, and its gain over the head fitted to labels alone (own = 1)."""
    inside = np.array([draw_aucs[variant]["internal"] for draw_aucs in aucs])
    gain = inside - [draw_aucs[variant[0], 1.0]["internal"] for draw_aucs in aucs]
    figures = {
        "inside": inside.mean(), "gain": gain.mean(), "error": gain.std(ddof=1) / len(gain) ** 0.5, "worst": gain.min(),
        "below": int((gain < 0).sum()), "outside": np.mean([draw_aucs[variant]["external"] for draw_aucs in aucs]),
    }  # fmt: skip
    return {"share": share, "sharpness": variant[0], "own": variant[1]} | {
        k: round(float(v), 5) for k, v in figures.items()
    }


if __name__ == "__main__":
    main()
