"""Calibration on held-out images: AUC, the temperature of a finding, its operating threshold.

Pure numpy on logits and labels (nan = unknown). A threshold carries the rule that gave it, so that a site with few
labels sees a default and not a measurement.
"""

from typing import Any

import numpy as np

from learner.evaluation import auc as curves

MIN_CLASS = 5  # images of each class below which neither a temperature nor a threshold is fitted: it would be noise
BETA = (0.05, 20.0)  # 1 / temperature; wider fits come from labels that the logits separate completely


def auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the area under the ROC curve; None when a class is absent (JSON has no nan)."""
    value = curves.auc(scores, labels)
    return None if np.isnan(value) else value


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the T that minimises the log loss of sigmoid(logit / T); 1 with too few labels. Bisection on 1 / T (convex)."""
    known = ~np.isnan(labels)
    logits, truth = logits[known].astype(np.float64), labels[known]
    if min((truth == 1).sum(), (truth == 0).sum()) < MIN_CLASS:
        return 1.0
    low, high = BETA
    beta = 1.0
    for _ in range(60):
        beta = (low + high) / 2
        slope = ((_sigmoid(beta * logits) - truth) * logits).sum()
        low, high = (low, beta) if slope > 0 else (beta, high)
    return float(1 / beta)


def threshold(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return one finding's threshold, its rule and its `n` labels; sensitivity and specificity are None where unmeasured."""
    known = ~np.isnan(labels)
    scores, truth = probabilities[known], labels[known] == 1
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if min(positives, negatives) < MIN_CLASS:
        why = "no calibration labels" if not len(truth) else f"fewer than {MIN_CLASS} of a class in calibration"
        rule, cut = f"0.5: {why}", 0.5
    else:
        levels = np.unique(scores)
        cuts = np.concatenate([[levels[0]], (levels[1:] + levels[:-1]) / 2])
        youden = [(scores[truth] >= c).mean() + (scores[~truth] < c).mean() for c in cuts]
        rule, cut = "youden on calibration", float(cuts[int(np.argmax(youden))])
    return {
        "threshold": cut, "rule": rule, "n": int(known.sum()),
        "sensitivity": float((scores[truth] >= cut).mean()) if positives else None,
        "specificity": float((scores[~truth] < cut).mean()) if negatives else None,
    }  # fmt: skip


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))
