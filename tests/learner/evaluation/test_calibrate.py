"""AUC, temperature and threshold against plain counting, and their defaults."""

import numpy as np
import pytest

from learner.evaluation.calibrate import auc, temperature, threshold


def sample(seed=0, samples=200, scale=1.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, samples)
    labels = (rng.random(samples) < 1 / (1 + np.exp(-logits))).astype(float)
    return logits * scale, labels


def test_auc_counts_pairs_and_halves_ties():
    scores, labels = np.array([0.1, 0.4, 0.4, 0.8, 0.9]), np.array([0, 1, 0, np.nan, 1])
    pairs = [(s > t) + 0.5 * (s == t) for s in (0.4, 0.9) for t in (0.1, 0.4)]
    assert auc(scores, labels) == pytest.approx(np.mean(pairs))
    assert auc(scores, np.array([0, 0, 0, np.nan, 0])) is None


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_temperature_undoes_overconfidence(scale):
    logits, labels = sample(samples=4000, scale=scale)
    assert temperature(logits, labels) == pytest.approx(scale, rel=0.15)


def test_temperature_is_the_best_on_a_grid():
    logits, labels = sample(seed=3, scale=2.0)

    def cost(t):
        return np.logaddexp(0, logits / t).sum() - (logits / t * labels).sum()

    fitted = temperature(logits, labels)
    assert cost(fitted) <= min(cost(t) for t in np.geomspace(0.1, 10, 400)) + 1e-6


def test_too_few_labels_leave_the_defaults_and_say_so():
    logits, labels = sample(samples=6)
    assert temperature(logits, labels) == 1.0
    few = threshold(1 / (1 + np.exp(-logits)), labels)
    assert (few["threshold"], few["rule"]) == (0.5, "0.5: fewer than 5 of a class in calibration")
    assert few["sensitivity"] is not None
    none = threshold(logits, np.full(6, np.nan))
    assert none == {
        "threshold": 0.5,
        "rule": "0.5: no calibration labels",
        "n": 0,
        "sensitivity": None,
        "specificity": None,
    }


def test_threshold_is_youdens():
    logits, labels = sample(seed=5)
    scores = 1 / (1 + np.exp(-logits))
    chosen = threshold(scores, labels)
    best = max((scores[labels == 1] >= c).mean() + (scores[labels == 0] < c).mean() for c in np.linspace(0, 1, 2001))
    assert chosen["sensitivity"] + chosen["specificity"] == pytest.approx(best)
    assert chosen["rule"] == "youden on calibration"
