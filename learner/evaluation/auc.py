"""AUC, its variance where a patient has several images, and the difference of two AUCs on the logit scale.

Sources: DeLong, DeLong & Clarke-Pearson, Biometrics 1988 (components); Obuchowski, Biometrics 1997 (clusters);
Sun & Xu, IEEE SPL 2014 (midranks).
Must import numpy and the standard library only. Margins, budgets and the champion belong to the gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, log, sqrt
from statistics import NormalDist

import numpy as np

NORMAL = NormalDist()
EDGE = 1e-9  # a hypothetical AUC is kept this far from 0 and 1, where the logit ends


def midranks(values: np.ndarray) -> np.ndarray:
    """Return float [n], the ranks from 1; tied values share their mean rank."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    ends = np.r_[starts[1:], len(values)]
    ranks = np.empty(len(values))
    ranks[order] = np.repeat((starts + ends + 1) / 2, ends - starts)
    return ranks


def placements(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return DeLong's components; the mean of each is the AUC.

    float [m]: for each positive the share of negatives below it (a tie is half). float [n]: for each negative the share of
    positives above it.
    """
    pos, neg = scores[positive], scores[~positive]
    ranks = midranks(np.r_[pos, neg])
    m, n = len(pos), len(neg)
    return (ranks[:m] - midranks(pos)) / n, 1 - (ranks[m:] - midranks(neg)) / m


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the area under the ROC curve without unknown (nan) labels; nan where one class is missing."""
    known = ~np.isnan(np.asarray(labels, float))
    positive = np.asarray(labels)[known] > 0.5
    if positive.all() or not positive.any():
        return float("nan")
    return float(placements(np.asarray(scores)[known], positive)[0].mean())


@dataclass(frozen=True)
class Curve:
    """One model's AUC on one finding, and each patient's contribution to its error.

    `above` and `below`, float [patients]: the patient's share in the deviation of the AUC, through positives and
    through negatives. Sums of products of these are Obuchowski's variances and covariances, so a linear combination
    of curves gets its variance by combining the vectors first.
    """

    value: float
    above: np.ndarray
    below: np.ndarray
    cross: float  # weight of above x below: 1 except for small-sample factors; has an effect with clusters only
    pair: float  # 1 / (m n), the weight of one pair of images

    @property
    def level(self) -> float:
        """Return `value`, with 1 counted as one wrong pair of images and 0 as one right pair, so that the logit is finite."""
        return min(max(self.value, self.pair), 1 - self.pair)

    @property
    def extra(self) -> float:
        """Return the variance of that one pair; without it a perfect sample would have no error."""
        return 2 * self.pair**2 if self.value in (0.0, 1.0) else 0.0

    @property
    def variance(self) -> float:
        """Return Obuchowski's variance of the AUC."""
        return covariance(self, self) + self.extra


def curve(scores: np.ndarray, labels: np.ndarray, patient: np.ndarray, patients: int) -> Curve:
    """Return the Curve of float `scores` [n] against `labels` [n] in {0, 1}; `patient` [n] indexes 0 .. patients - 1.

    ValueError unless each class has two patients or more.
    """
    positive = labels > 0.5
    held, spared = _clusters(patient[positive], patients), _clusters(patient[~positive], patients)
    if held < 2 or spared < 2:
        raise ValueError(f"AUC needs two patients of each class, have {held} with the finding and {spared} without")
    up, down = placements(scores, positive)
    value, m, n = float(up.mean()), len(up), len(down)
    both = _clusters(patient, patients)
    f10, f01, f11 = held / (held - 1), spared / (spared - 1), both / (both - 1)
    above = np.bincount(patient[positive], up - value, patients) * sqrt(f10) / m
    below = np.bincount(patient[~positive], down - value, patients) * sqrt(f01) / n
    return Curve(value, above, below, f11 / sqrt(f10 * f01), 1 / (m * n))


def _clusters(patient: np.ndarray, patients: int) -> int:
    return int(np.count_nonzero(np.bincount(patient, minlength=patients)))


def macro(curves: Sequence[Curve]) -> Curve:
    """Return the mean AUC over findings; a patient with several findings counts as one patient."""
    k = len(curves)
    return Curve(
        sum(c.value for c in curves) / k,
        np.sum([c.above for c in curves], axis=0) / k,
        np.sum([c.below for c in curves], axis=0) / k,
        sum(c.cross for c in curves) / k,
        min(c.pair for c in curves) / k,
    )


def covariance(a: Curve, b: Curve) -> float:
    """Return Obuchowski's covariance of two AUCs on the same patients."""
    mixed = float(a.above @ b.below + a.below @ b.above) / 2
    return float(a.above @ b.above + a.below @ b.below) + 2 * a.cross * mixed


def correlation(a: Curve, b: Curve) -> float:
    """Return the correlation of two AUC estimates over samples of patients; nan where one of them has no variance."""
    spread = a.variance * b.variance
    return covariance(a, b) / sqrt(spread) if spread > 0 else float("nan")


def same(a: Curve, b: Curve) -> bool:
    """Return True when both rank every image alike: the AUCs are equal on every sample of these patients."""
    return a.value == b.value and np.array_equal(a.above, b.above) and np.array_equal(a.below, b.below)


def statistic(candidate: Curve, reference: Curve, shift: np.ndarray | float) -> np.ndarray:
    """Return z of logit(candidate) - logit(reference + shift), by the delta method; `shift` is -margin for non-inferiority.

    inf or -inf where nothing varies. On the logit scale, since the plain difference has too high a level at a high AUC (see
    bench/learning/creep.py).
    """
    shifted = np.clip(reference.level + np.asarray(shift, float), EDGE, 1 - EDGE)
    a = candidate.level
    slope, slant = 1 / (a * (1 - a)), 1 / (shifted * (1 - shifted))
    own, ref, joint = candidate.variance, reference.variance, covariance(candidate, reference)
    spread = np.sqrt(np.maximum(slope**2 * own + slant**2 * ref - 2 * slope * slant * joint, 0.0))
    apart = log(a / (1 - a)) - np.log(shifted / (1 - shifted))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 0, apart / spread, np.where(apart == 0, 0.0, np.copysign(inf, apart)))


def interval(candidate: Curve, reference: Curve, alpha: float) -> tuple[float, float]:
    """Return the bounds of the difference in AUC, each at one-sided `alpha`: the shifts that `statistic` does not reject.

    So "lower bound > -margin" is the test on the logit scale at that margin: the printed interval is the one that decides.
    """
    if same(candidate, reference):
        return 0.0, 0.0
    z, middle = -NORMAL.inv_cdf(alpha), candidate.level - reference.level
    low = _first(lambda d: statistic(candidate, reference, d) - z, middle, -reference.level)
    high = _first(lambda d: -statistic(candidate, reference, d) - z, middle, 1 - reference.level)
    return low, high


def _first(beyond, start: float, end: float) -> float:
    """Return the first point between `start` and `end` where `beyond` turns positive; `end` if it never does."""
    walk = start + (end - start) * np.linspace(0, 1, 257)[1:] ** 2
    positive = np.flatnonzero(beyond(walk) >= 0)
    if not len(positive):
        return float(end)
    right = float(walk[positive[0]])
    left = float(walk[positive[0] - 1]) if positive[0] else start
    for _ in range(50):
        half = (left + right) / 2
        left, right = (left, half) if beyond(half) >= 0 else (half, right)
    return right


def gap(value: float, variance: float, correlation: float, margin: float) -> float:
    """Return the margin in standard errors, on the logit scale, for two models of equal AUC: float > 0."""
    value = min(max(value, EDGE), 1 - EDGE)
    lower = max(value - margin, EDGE)
    slope, slant = 1 / (value * (1 - value)), 1 / (lower * (1 - lower))
    spread = sqrt(max(variance * (slope**2 + slant**2 - 2 * correlation * slope * slant), 1e-18))
    return (log(value / (1 - value)) - log(lower / (1 - lower))) / spread


def power(value: float, variance: float, correlation: float, margin: float, alpha: float) -> float:
    """Return the chance that one evaluation at one-sided `alpha` shows a candidate equal to its reference non-inferior.

    `value`, `variance`: the AUC of both, and the variance of one estimate as a Curve has it (in a set k times as large,
    divide by k). `correlation`: of the two estimates, measured on the site's scores. Phi(gap - z(1 - alpha)) is the usual
    power of a one-sided normal test at no difference (Blackwelder, Controlled Clinical Trials 1982), with our `gap`.
    """
    return NORMAL.cdf(gap(value, variance, correlation, margin) + NORMAL.inv_cdf(alpha))


def holm(tails: Mapping[str, float], alpha: float) -> list[str]:
    """Return the names whose p is significant at family level `alpha`, smallest p first (Holm, Scand J Statist 1979)."""
    significant: list[str] = []
    for name in sorted(tails, key=tails.__getitem__):
        if tails[name] > alpha / (len(tails) - len(significant)):
            break
        significant.append(name)
    return significant


def alpha_per_evaluation(yearly: float, evaluations_per_year: int) -> float:
    """Return the level of one evaluation: a year's alpha over its evaluations (Bonferroni), since all reuse one golden set.

    ValueError for an alpha outside 0 to 0.5, or less than one evaluation.
    """
    if not 0 < yearly < 0.5 or evaluations_per_year < 1:
        raise ValueError(
            f"alpha {yearly} over {evaluations_per_year} evaluations: need 0 < alpha < 0.5 and at least one evaluation"
        )
    return yearly / evaluations_per_year
