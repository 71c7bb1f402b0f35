"""Choose among candidate models on a few validation patients, where the error of an AUC exceeds most differences.

The one-standard-error rule (Breiman et al. 1984) with the error of the paired difference: of all candidates within one
standard error of the best, take the first named.
"""

from collections.abc import Sequence
from math import sqrt

import numpy as np

from learner.evaluation.auc import Curve, covariance, curve, macro

FEWEST = 5  # images of each class of each finding below which nothing is chosen by their AUC


def macro_curve(logits: np.ndarray, labels: np.ndarray, patients: Sequence[str]) -> Curve | None:
    """Return the macro AUC of logits float [N, F] against labels [N, F] (nan = unknown), errors clustered by patient.

    None where a finding has fewer than FEWEST images, or two patients, of a class.
    """
    numbers = np.unique(np.asarray(patients), return_inverse=True)[1]
    curves = []
    for i in range(labels.shape[1]):
        known = ~np.isnan(labels[:, i])
        truth, who = labels[known, i] > 0.5, numbers[known]
        if min(truth.sum(), (~truth).sum()) < FEWEST or min(len(set(who[truth])), len(set(who[~truth]))) < 2:
            return None
        curves.append(curve(logits[known, i], truth, who, int(numbers.max()) + 1))
    return macro(curves)


def first_as_good(measured: Sequence[Curve]) -> int:
    """Return the index of the first Curve within one standard error of the difference to the best."""
    best = max(measured, key=lambda candidate: candidate.value)
    return next(n for n, candidate in enumerate(measured) if best.value - candidate.value <= error(best, candidate))


def error(a: Curve, b: Curve) -> float:
    """Return the standard error of the difference of two AUCs on the same patients."""
    return sqrt(max(0.0, covariance(a, a) + covariance(b, b) - 2 * covariance(a, b)))
