"""Floors under every figure on these images: raw 24 x 24 pixels with logistic regression, and the view alone."""

import csv
from pathlib import Path

import numpy as np

from bench.learning.evolution_images import Pool, draw
from learner.evaluation import pixel_baseline
from learner.evaluation.auc import auc


def pixel_floor(pool: Pool, asked: list[tuple[str, float]], draws: list[int]) -> dict[str, dict[str, float]]:
    """Mean AUC over the draws by "experiment share", on both tests."""
    small = np.concatenate([pixel_baseline.thumbnails(np.load(sample.plate)[None]) for sample in pool.samples])
    said = {}
    for experiment, share in asked:
        rows = []
        for seed in draws:
            division = draw(pool, experiment, share, seed)
            labels = pool.truth[division.labelled][:, None].astype(float)
            fitted = pixel_baseline.fit(small[division.labelled], labels)
            places = [division.tests[name] for name in ("internal", "external")]
            rows.append([auc(fitted.scores(small[at])[:, 0], pool.truth[at].astype(float)) for at in places])
        internal, external = np.mean(rows, 0)
        said[f"{experiment} {share}"] = {"internal": round(float(internal), 4), "external": round(float(external), 4)}
    return said


def view_floor(data: Path) -> float:
    """AUC for abnormal of knowing only whether an adult's image is AP (a bed) or PA (standing)."""
    with (data / "nih1000_64" / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    abnormal = np.array([float(row["labels"] != "No Finding") for row in rows])
    return round(auc(np.array([float(row["view"] == "AP") for row in rows]), abnormal), 4)
