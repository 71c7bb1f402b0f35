"""The floor: a logistic regression on 24 x 24 raw pixels, printed beside every AUC on phantoms or public images.

An AUC that this model reaches shows that the data are easy, not that the learner is good. L2-regularised, by Newton's
method, in numpy; unknown labels are left out. It is never a candidate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIDE = 24  # 512 / 24 pixels are about the width of a rib: hearts and large effusions are visible, a nodule is not
PENALTY = 100.0  # on the summed loss: C = .01 in sklearn (D260)
STEPS = 50  # the most Newton steps; eight are usual


def thumbnails(plates: np.ndarray) -> np.ndarray:
    """Return float [N, 576], the area means of uint8 plates [N, H, W] in 24 x 24 nearly equal blocks; ValueError for small plates."""
    plates = np.asarray(plates)
    if plates.ndim != 3 or min(plates.shape[1:]) < SIDE:
        raise ValueError(f"plates are {plates.shape}, need [N, H, W] with sides of {SIDE} pixels or more")
    rows, columns = (np.linspace(0, side, SIDE + 1).round().astype(int) for side in plates.shape[1:])
    areas = np.diff(rows)[:, None] * np.diff(columns)[None, :]
    small = np.empty((len(plates), SIDE * SIDE))
    for i, plate in enumerate(plates):  # one at a time: a float copy of all plates would be eight times their size
        sums = np.add.reduceat(np.add.reduceat(plate, rows[:-1], axis=0, dtype=float), columns[:-1], axis=1)
        small[i] = (sums / areas).ravel()
    return small


@dataclass(frozen=True)
class Floor:
    """A fitted floor: weights on standardised thumbnails."""

    mean: np.ndarray  # [576]
    scale: np.ndarray
    weights: np.ndarray  # [576, F]
    bias: np.ndarray  # [F]

    def scores(self, small: np.ndarray) -> np.ndarray:
        """Return probabilities float [N, F] for thumbnails [N, 576]."""
        return _logistic((small - self.mean) / self.scale @ self.weights + self.bias)


def fit(small: np.ndarray, labels: np.ndarray, penalty: float = PENALTY) -> Floor:
    """Return the floor fitted to thumbnails [N, D] and labels [N, F] in {1, 0, nan}; one class alone gives a constant."""
    small, labels = np.asarray(small, float), np.asarray(labels, float)
    if labels.ndim != 2 or len(labels) != len(small):
        raise ValueError(f"labels are {labels.shape}, need [{len(small)}, findings]")
    mean, scale = small.mean(axis=0), small.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    x = (small - mean) / scale
    columns = []
    for column in labels.T:
        known = ~np.isnan(column)
        columns.append(_newton(x[known], column[known], penalty))
    weights = np.array([w for w, _ in columns]).T
    return Floor(mean, scale, weights, np.array([b for _, b in columns]))


def _newton(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """Return weights [D] and bias that minimise the summed log loss + penalty / 2 |weights|^2 (bias free), by damped Newton.

    Weights lie in the span of the images, so with fewer images than pixels the equations shrink to the number of images.
    """
    n, d = x.shape
    if n == 0 or y.min() == y.max():
        share = (y.sum() + 0.5) / (n + 1)
        return np.zeros(d), float(np.log(share / (1 - share)))
    basis = np.linalg.qr(x.T)[0] if n < d else np.eye(d)
    design = np.c_[x @ basis, np.ones(n)]
    ridge = np.r_[np.full(design.shape[1] - 1, penalty), 0.0]
    beta = np.r_[np.zeros(design.shape[1] - 1), np.log(y.mean() / (1 - y.mean()))]
    loss = _loss(design, y, beta, ridge)
    for _ in range(STEPS):
        p = _logistic(design @ beta)
        slope = design.T @ (p - y) + ridge * beta
        curve = (design * (p * (1 - p))[:, None]).T @ design + np.diag(ridge)
        step = np.linalg.solve(curve + 1e-9 * np.eye(len(beta)), slope)
        while (tried := _loss(design, y, beta - step, ridge)) > loss + 1e-12 and np.abs(step).max() > 1e-10:
            step = step / 2
        beta, loss = beta - step, tried
        if np.abs(step).max() < 1e-8:
            break
    return basis @ beta[:-1], float(beta[-1])


def _loss(design: np.ndarray, y: np.ndarray, beta: np.ndarray, ridge: np.ndarray) -> float:
    odds = design @ beta
    return float(np.logaddexp(0, odds).sum() - y @ odds + 0.5 * ridge @ beta**2)


def _logistic(odds: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * odds))
