"""Two cheap learners for `pool_study.py`: each takes labelled images and a pool, and returns a function that scores images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from learner.evaluation.pixel_baseline import fit, thumbnails

PATCH, STRIDE, GRID = 8, 4, 4  # pixels; regions a side, over which activations are averaged
CENTROIDS, PATCHES, ITERATIONS = 200, 30_000, 12
PENALTY = 1000.0  # of the logistic regression on patch features: the middle of the published range at these sizes
SURE = 0.75  # share of the pool that gets a pseudo-label

Scorer = Callable[[np.ndarray], np.ndarray]


def patch_features(labelled: np.ndarray, abnormal: np.ndarray, images: np.ndarray, seed: int) -> Scorer:
    """Learn features from the pool's patches and a logistic regression on them from the labelled images.

    images: uint8 [N, 96, 96]. Coates, Lee and Ng 2011: contrast-normalised, whitened patches; k-means; triangle activation.
    """
    rng = np.random.default_rng([seed, 31])
    each = -(-PATCHES // len(images))
    sample = np.concatenate([_patches(image)[rng.integers(0, 529, each)] for image in images])
    mean, (values, vectors) = sample.mean(0), np.linalg.eigh(np.cov(sample.T))
    whiten = vectors / np.sqrt(np.maximum(values, 0) + 0.1) @ vectors.T
    white = (sample - mean) @ whiten
    centres = white[rng.permutation(len(white))[:CENTROIDS]]
    for _ in range(ITERATIONS):
        nearest = _distances(white, centres).argmin(1)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, white)
        counts = np.bincount(nearest, minlength=CENTROIDS)[:, None]
        centres = np.where(counts > 0, sums / np.maximum(counts, 1), centres)

    def features(pixels: np.ndarray) -> np.ndarray:
        rows = []
        for image in pixels:
            apart = np.sqrt(np.maximum(_distances((_patches(image) - mean) @ whiten, centres), 0))
            active = np.maximum(apart.mean(1, keepdims=True) - apart, 0).reshape(23, 23, CENTROIDS)
            parts = [np.array_split(row, GRID, axis=1) for row in np.array_split(active, GRID, axis=0)]
            rows.append(np.concatenate([part.mean((0, 1)) for row in parts for part in row]))
        return np.array(rows)

    model = fit(features(labelled), abnormal[:, None].astype(float), PENALTY)
    return lambda pixels: model.scores(features(pixels))[:, 0]


def self_training(labelled: np.ndarray, abnormal: np.ndarray, images: np.ndarray, seed: int) -> Scorer:
    """Fit raw pixels to the labels, then to the labels and the surest pseudo-labels of the pool. Deterministic."""
    known, waiting = thumbnails(labelled), thumbnails(images)
    truth = abnormal[:, None].astype(float)
    odds = fit(known, truth).scores(waiting)[:, 0]
    sure = np.argsort(-abs(odds - 0.5))[: round(SURE * len(odds))]
    pseudo = (odds[sure] > 0.5).astype(float)[:, None]
    student = fit(np.concatenate([known, waiting[sure]]), np.concatenate([truth, pseudo]))
    return lambda pixels: student.scores(thumbnails(pixels))[:, 0]


LEARNERS = {"patch features": patch_features, "self-training": self_training}


def _patches(image: np.ndarray) -> np.ndarray:
    """Return the contrast-normalised patches of an image, uint8 [96, 96], float [529, 64]."""
    windows = np.lib.stride_tricks.sliding_window_view(image, (PATCH, PATCH))[::STRIDE, ::STRIDE]
    flat = windows.reshape(-1, PATCH * PATCH).astype(float)
    return (flat - flat.mean(1, keepdims=True)) / np.sqrt(flat.var(1, keepdims=True) + 10)


def _distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return squared distances [N, K]."""
    return (points**2).sum(1)[:, None] - 2 * points @ centres.T + (centres**2).sum(1)[None]
