"""AUC, its variance where a patient has several images, and the difference of two AUCs on the logit scale.

Sources: DeLong, DeLong & Clarke-Pearson, Biometrics 1988 (components); Obuchowski, Biometrics 1997 (clusters);
Sun & Xu, IEEE SPL 2014 (midranks).
numpy and the standard library. Knows nothing of margins that a site chose, of budgets, or of who is champion.
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
    """float [n], ranks from 1, tied values share their mean rank."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    ends = np.r_[starts[1:], len(values)]
    ranks = np.empty(len(values))
    ranks[order] = np.repeat((starts + ends + 1) / 2, ends - starts)
    return ranks


def placements(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DeLong's components: float [m], for each positive the share of negatives below it (a tie is half), and
    float [n], for each negative the share of positives above it. Both have the AUC as their mean."""
    pos, neg = scores[positive], scores[~positive]
    ranks = midranks(np.r_[pos, neg])
    m, n = len(pos), len(neg)
    return (ranks[:m] - midranks(pos)) / n, 1 - (ranks[m:] - midranks(neg)) / m


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve; unknown (nan) labels left out; nan where one class is missing."""
    known = ~np.isnan(np.asarray(labels, float))
    positive = np.asarray(labels)[known] > 0.5
    if positive.all() or not positive.any():
        return float("nan")
    return float(placements(np.asarray(scores)[known], positive)[0].mean())


@dataclass(frozen=True)
class Curve:
    """One model's AUC on one finding and what each patient contributes to its error.

    `above` and `below`, float [patients]: the patient's share in the deviation of the AUC, through positives and
    through negatives. Sums of products of these are Obuchowski's variances and covariances, so a linear combination
    of curves has its variance by combining the vectors first.
    """

    value: float
    above: np.ndarray
    below: np.ndarray
    cross: float  # weight of above x below: 1 but for the small-sample factors; only clusters make it matter
    pair: float  # 1 / (m n), the weight of one pair of images

    @property
    def level(self) -> float:
        """`value`, but 1 is read as one pair of images wrong and 0 as one pair right: the logit stays finite."""
        return min(max(self.value, self.pair), 1 - self.pair)

    @property
    def extra(self) -> float:
        """Variance of that one pair; without it a perfect sample would claim to be certain."""
        return 2 * self.pair**2 if self.value in (0.0, 1.0) else 0.0

    @property
    def variance(self) -> float:
        return covariance(self, self) + self.extra


def curve(scores: np.ndarray, labels: np.ndarray, patient: np.ndarray, patients: int) -> Curve:
    """The Curve of float `scores` [n] against `labels` [n] in {0, 1}; `patient` [n] indexes 0 .. patients - 1.

    Needs both classes, each in two patients or more: ValueError otherwise.
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
    """The mean AUC over findings, with patients that appear under several findings counted as one patient each."""
    k = len(curves)
    return Curve(
        sum(c.value for c in curves) / k,
        np.sum([c.above for c in curves], axis=0) / k,
        np.sum([c.below for c in curves], axis=0) / k,
        sum(c.cross for c in curves) / k,
        min(c.pair for c in curves) / k,
    )


def covariance(a: Curve, b: Curve) -> float:
    mixed = float(a.above @ b.below + a.below @ b.above) / 2
    return float(a.above @ b.above + a.below @ b.below) + 2 * a.cross * mixed


def correlation(a: Curve, b: Curve) -> float:
    """Of the two AUC estimates, over samples of patients; nan where one does not vary."""
    spread = a.variance * b.variance
    return covariance(a, b) / sqrt(spread) if spread > 0 else float("nan")


def same(a: Curve, b: Curve) -> bool:
    """No image is placed differently: the difference of the AUCs is 0 on every sample of these patients."""
    return a.value == b.value and np.array_equal(a.above, b.above) and np.array_equal(a.below, b.below)


def statistic(candidate: Curve, reference: Curve, shift: np.ndarray | float) -> np.ndarray:
    """z of logit(candidate) - logit(reference + shift), by the delta method; `shift` is -margin for non-inferiority.

    inf or -inf where nothing varies; the plain difference has too high a level at high AUC (see bench/learning/creep.py).
    """
    other = np.clip(reference.level + np.asarray(shift, float), EDGE, 1 - EDGE)
    a = candidate.level
    slope, slant = 1 / (a * (1 - a)), 1 / (other * (1 - other))
    own, ref, joint = candidate.variance, reference.variance, covariance(candidate, reference)
    spread = np.sqrt(np.maximum(slope**2 * own + slant**2 * ref - 2 * slope * slant * joint, 0.0))
    apart = log(a / (1 - a)) - np.log(other / (1 - other))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 0, apart / spread, np.where(apart == 0, 0.0, np.copysign(inf, apart)))


def interval(candidate: Curve, reference: Curve, alpha: float) -> tuple[float, float]:
    """Bounds of the difference in AUC, each at one-sided `alpha`: the shifts that `statistic` does not reject.

    So "lower bound > -margin" is the test on the logit scale at that margin, and what is shown is what decided.
    """
    if same(candidate, reference):
        return 0.0, 0.0
    z, middle = -NORMAL.inv_cdf(alpha), candidate.level - reference.level
    low = _first(lambda d: statistic(candidate, reference, d) - z, middle, -reference.level)
    high = _first(lambda d: -statistic(candidate, reference, d) - z, middle, 1 - reference.level)
    return low, high


def _first(beyond, start: float, end: float) -> float:
    """Walking from `start` to `end`, where `beyond` first turns positive; `end` if it never does."""
    walk = start + (end - start) * np.linspace(0, 1, 257)[1:] ** 2
    found = np.flatnonzero(beyond(walk) >= 0)
    if not len(found):
        return float(end)
    right = float(walk[found[0]])
    left = float(walk[found[0] - 1]) if found[0] else start
    for _ in range(50):
        half = (left + right) / 2
        left, right = (left, half) if beyond(half) >= 0 else (half, right)
    return right


def gap(value: float, variance: float, correlation: float, margin: float) -> float:
    """The margin in standard errors, on the logit scale, for two models of equal AUC: float > 0."""
    value = min(max(value, EDGE), 1 - EDGE)
    other = max(value - margin, EDGE)
    slope, slant = 1 / (value * (1 - value)), 1 / (other * (1 - other))
    spread = sqrt(max(variance * (slope**2 + slant**2 - 2 * correlation * slope * slant), 1e-18))
    return (log(value / (1 - value)) - log(other / (1 - other))) / spread


def power(value: float, variance: float, correlation: float, margin: float, alpha: float) -> float:
    """Chance that a candidate truly equal to its reference is shown non-inferior in one look at one-sided `alpha`.

    `value`, `variance`: AUC of both and the variance of one estimate as a Curve has it (in a set k times as
    large, divide by k); `correlation` of the two estimates as measured on the site's scores. Phi(gap - z(1 - alpha)): the usual power of a one-sided
    normal test at no difference (Blackwelder, Controlled Clinical Trials 1982), with the gap of `statistic`.
    """
    return NORMAL.cdf(gap(value, variance, correlation, margin) + NORMAL.inv_cdf(alpha))


def holm(tails: Mapping[str, float], alpha: float) -> list[str]:
    """The names whose p stands at family level `alpha`, smallest first (Holm, Scand J Statist 1979)."""
    stands: list[str] = []
    for name in sorted(tails, key=tails.__getitem__):
        if tails[name] > alpha / (len(tails) - len(stands)):
            break
        stands.append(name)
    return stands


def alpha_per_look(yearly: float, looks_per_year: int) -> float:
    """The level of one look: Bonferroni over the year's looks, so that any reuse of the golden set is paid for."""
    if not 0 < yearly < 0.5 or looks_per_year < 1:
        raise ValueError(f"alpha {yearly} over {looks_per_year} looks: need 0 < alpha < 0.5 and at least one look")
    return yearly / looks_per_year
