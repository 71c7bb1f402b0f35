"""Lower reference values for every AUC on these images: raw 24 x 24 pixels with logistic regression, and the view alone."""

from pathlib import Path

import numpy as np

from bench.common.public_images import read_set
from bench.learning.evolution_images import Pool, draw
from learner.evaluation import pixel_baseline
from learner.evaluation.auc import auc


def pixel_floor(pool: Pool, cells: list[tuple[str, float]], draws: list[int]) -> dict[str, dict[str, float]]:
    """Return the mean AUC over the draws for each "experiment share", on both tests."""
    small = np.concatenate([pixel_baseline.thumbnails(np.load(sample.plate)[None]) for sample in pool.samples])
    floors = {}
    for experiment, share in cells:
        rows = []
        for seed in draws:
            division = draw(pool, experiment, share, seed)
            labels = pool.truth[division.labelled][:, None].astype(float)
            fitted = pixel_baseline.fit(small[division.labelled], labels)
            places = [division.tests[name] for name in ("internal", "external")]
            rows.append([auc(fitted.scores(small[at])[:, 0], pool.truth[at].astype(float)) for at in places])
        internal, external = np.mean(rows, 0)
        floors[f"{experiment} {share}"] = {"internal": round(float(internal), 4), "external": round(float(external), 4)}
    return floors


def view_floor(data: Path) -> float:
    """Return the AUC for abnormal of the view alone: AP (in bed) or PA (standing)."""
    images = read_set(data / "nih1000_64")
    abnormal = np.array([float(image.abnormal) for image in images])
    return round(auc(np.array([float(image.view == "AP") for image in images]), abnormal), 4)
