"""AUC, variances and power against sklearn, plain loops, a bootstrap over patients and simulation."""

from math import log, nan, sqrt
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from learner.evaluation import auc as stats
from learner.evaluation.gate import Scores, alpha_per_evaluation, auc, power
from tests.support.learner.golden_scores import ALPHA, Site, binormal, row


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=60))
def test_auc_is_sklearns_with_ties(samples):
    scores, labels = np.array([s for s, _ in samples], float), np.array([y for _, y in samples], float)
    if 0 < labels.sum() < len(labels):
        assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        assert auc(scores**3 + 5, labels) == pytest.approx(auc(scores, labels), abs=1e-12)  # only the order counts
        assert auc(-scores, labels) == pytest.approx(1 - auc(scores, labels), abs=1e-12)
    else:
        assert np.isnan(auc(scores, labels))


def test_unknown_labels_are_left_out_of_an_auc():
    labels = np.array([1, 0, nan, 1, 0, nan])
    scores = np.array([0.9, 0.1, 0.0, 0.4, 0.5, 1.0])
    assert auc(scores, labels) == pytest.approx(roc_auc_score([1, 0, 1, 0], [0.9, 0.1, 0.4, 0.5]))


def delong_by_loops(a: np.ndarray, b: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """2 x 2 covariance of two AUCs, from the definition in DeLong 1988, equations 4 to 6."""
    pos, neg = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    v10, v01 = np.zeros((2, len(pos))), np.zeros((2, len(neg)))
    for k, s in enumerate((a, b)):
        for i, p in enumerate(pos):
            v10[k, i] = np.mean([(s[p] > s[q]) + 0.5 * (s[p] == s[q]) for q in neg])
        for j, q in enumerate(neg):
            v01[k, j] = np.mean([(s[p] > s[q]) + 0.5 * (s[p] == s[q]) for p in pos])
    return np.cov(v10) / len(pos) + np.cov(v01) / len(neg)


def obuchowski_by_loops(a: np.ndarray, b: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """2 x 2 covariance with clusters, from the definition in Obuchowski 1997."""
    m, n, models = int(labels.sum()), int((1 - labels).sum()), (a, b)
    level, sums = [roc_auc_score(labels, s) for s in models], np.zeros((2, 2, patients.max() + 1))
    held, spared = np.zeros(patients.max() + 1), np.zeros(patients.max() + 1)
    for p in range(len(labels)):
        (held if labels[p] else spared)[patients[p]] += 1
        others = np.flatnonzero(labels != labels[p])
        for k, s in enumerate(models):
            wins = [(s[p] > s[q]) if labels[p] else (s[q] > s[p]) for q in others]
            ties = [0.5 * (s[p] == s[q]) for q in others]
            sums[k, 0 if labels[p] else 1, patients[p]] += np.mean(np.array(wins) + np.array(ties))
    i10, i01, both = (held > 0).sum(), (spared > 0).sum(), len(np.unique(patients))
    result = np.zeros((2, 2))
    for k in range(2):
        for h in range(2):
            d10 = [(sums[x, 0] - held * level[x]) for x in (k, h)]
            d01 = [(sums[x, 1] - spared * level[x]) for x in (k, h)]
            s10 = i10 / ((i10 - 1) * m) * (d10[0] @ d10[1])
            s01 = i01 / ((i01 - 1) * n) * (d01[0] @ d01[1])
            s11 = both / (both - 1) * (d10[0] @ d01[1]), both / (both - 1) * (d10[1] @ d01[0])
            result[k, h] = s10 / m + s01 / n + (s11[0] + s11[1]) / (m * n)
    return result


@pytest.mark.parametrize("seed", range(4))
def test_variance_is_delongs_with_one_image_a_patient_and_obuchowskis_with_several(seed):
    rng = np.random.default_rng(seed)
    labels = (rng.random(70) < 0.4).astype(float)
    shared = rng.standard_normal(70)
    a, b = (np.round(binormal(rng, labels, 0.8, shared, 0.6), 1) for _ in range(2))  # rounded: ties

    def matrix(patient: np.ndarray) -> np.ndarray:
        curves = [stats.curve(s, labels, patient, int(patient.max()) + 1) for s in (a, b)]
        return np.array([[stats.covariance(x, y) for y in curves] for x in curves])

    assert matrix(np.arange(70)) == pytest.approx(delong_by_loops(a, b, labels), rel=1e-9)
    several = np.sort(rng.integers(0, 30, 70))
    several = np.unique(several, return_inverse=True)[1]
    assert matrix(several) == pytest.approx(obuchowski_by_loops(a, b, labels, several), rel=1e-9)


def test_clustered_variance_agrees_with_a_bootstrap_over_patients():
    rng = np.random.default_rng(5)
    patients = np.repeat(np.arange(150), 3)
    sick = np.repeat((rng.random(150) < 0.4).astype(float), 3)
    labels = np.where(rng.random(450) < 0.1, 1 - sick, sick)
    person = np.repeat(rng.standard_normal(150), 3)  # images of a patient look alike
    a, b = (binormal(rng, labels, 0.85, person, 0.7) for _ in range(2))
    curve_a, curve_b = (stats.curve(s, labels, patients, 150) for s in (a, b))
    measured = curve_a.variance + curve_b.variance - 2 * stats.covariance(curve_a, curve_b)
    samples = [np.flatnonzero(patients == p) for p in range(150)]
    draws = []
    for _ in range(800):
        pick = np.concatenate([samples[p] for p in rng.integers(0, 150, 150)])
        draws.append([auc(a[pick], labels[pick]), auc(b[pick], labels[pick])])
    drawn = np.array(draws)
    assert curve_a.variance == pytest.approx(drawn[:, 0].var(), rel=0.2)
    assert measured == pytest.approx((drawn[:, 0] - drawn[:, 1]).var(), rel=0.2)
    alone = stats.curve(a, labels, np.arange(450), 450)
    assert curve_a.variance > 1.5 * alone.variance  # counted as 450 patients the error would be far too small


def test_the_interval_is_the_logit_test_turned_inside_out():
    site = Site(seed=2)
    a, b = site.model(0.90), site.model(0.91)
    table = [stats.curve(s.probabilities[:, 0], site.labels[:, 0], np.arange(900), 900) for s in (a, b)]
    for alpha in (0.05, 0.01, ALPHA):
        z = NormalDist().inv_cdf(1 - alpha)
        low, high = stats.interval(table[0], table[1], alpha)
        assert float(stats.statistic(*table, low)) == pytest.approx(z, abs=1e-6)
        assert float(stats.statistic(*table, high)) == pytest.approx(-z, abs=1e-6)
        for margin in np.linspace(0.001, 0.1, 40):
            assert (low > -margin) == (float(stats.statistic(*table, -margin)) > z)


def test_swapping_the_models_mirrors_a_test_without_margin():
    site = Site(seed=3)
    a, b = (stats.curve(site.model(0.9).probabilities[:, 0], site.labels[:, 0], np.arange(900), 900) for _ in range(2))
    assert float(stats.statistic(a, b, 0.0)) == pytest.approx(-float(stats.statistic(b, a, 0.0)))


def test_only_the_order_of_the_scores_counts():
    site = Site(seed=4)
    a, b = site.model(0.9), site.model(0.9)
    bent = Scores(a.probabilities**2)  # monotone
    assert row(site.judge(a, b), "vs champion", "effusion").ci == pytest.approx(
        row(site.judge(bent, b), "vs champion", "effusion").ci
    )


def test_power_is_the_share_of_evaluations_that_pass_when_nothing_changed():
    rng, alpha, n = np.random.default_rng(0), 0.05, 500
    labels = (np.arange(n) < 120).astype(float)
    passed, promised = 0, []
    for _ in range(400):
        shared = rng.standard_normal(n)
        a, b = (stats.curve(binormal(rng, labels, 0.91, shared, 0.9), labels, np.arange(n), n) for _ in range(2))
        passed += float(stats.statistic(a, b, -0.02)) > NormalDist().inv_cdf(1 - alpha)
        promised.append(power(b.value, b.variance, stats.correlation(a, b), 0.02, alpha))
    assert np.mean(promised) == pytest.approx(passed / 400, abs=0.07)


def test_power_grows_with_the_set_and_falls_with_the_number_of_evaluations():
    def at(positives: int, evaluations: int) -> float:
        return power(0.91, 0.024 / positives, 0.95, 0.02, alpha_per_evaluation(0.05, evaluations))

    assert at(50, 52) < at(100, 52) < at(200, 52) < at(400, 52)
    assert at(100, 365) < at(100, 52) < at(100, 1)


def test_a_year_of_evaluations_spends_exactly_the_years_alpha():
    assert 52 * alpha_per_evaluation(0.05, 52) == pytest.approx(0.05)
    assert alpha_per_evaluation(0.05, 1) == 0.05
    with pytest.raises(ValueError, match="at least one evaluation"):
        alpha_per_evaluation(0.05, 0)


# --------------------------------------------------------------------------------------------------------- the level


def test_a_candidate_at_the_margin_slips_through_about_as_often_as_alpha_says():
    rng, n, runs, alpha = np.random.default_rng(1), 600, 1500, 0.05
    labels = (np.arange(n) < 120).astype(float)
    z, slipped = NormalDist().inv_cdf(1 - alpha), 0
    for _ in range(runs):
        shared = rng.standard_normal(n)
        worse = stats.curve(binormal(rng, labels, 0.89, shared, 0.9), labels, np.arange(n), n)
        champion = stats.curve(binormal(rng, labels, 0.91, shared, 0.9), labels, np.arange(n), n)
        slipped += float(stats.statistic(worse, champion, -0.02)) > z
    assert slipped / runs == pytest.approx(alpha, abs=3.3 * sqrt(alpha * (1 - alpha) / runs))


def test_two_references_at_the_margin_are_harder_to_pass_than_one():
    rng, n, runs, alpha = np.random.default_rng(2), 400, 400, 0.1
    z, against_one, against_both = NormalDist().inv_cdf(1 - alpha), 0, 0
    labels = (np.arange(n) < 120).astype(float)
    for _ in range(runs):
        shared = rng.standard_normal(n)
        worse, champion, baseline = (
            stats.curve(binormal(rng, labels, level, shared, 0.9), labels, np.arange(n), n)
            for level in (0.89, 0.91, 0.91)
        )
        passed = [float(stats.statistic(worse, reference, -0.02)) > z for reference in (champion, baseline)]
        against_one, against_both = against_one + passed[0], against_both + all(passed)
    assert against_both <= against_one
    assert against_both / runs < alpha + 3 * sqrt(alpha * (1 - alpha) / runs)  # no split of alpha is needed


def test_the_logit_gap_agrees_with_its_formula():
    """logit(A_candidate) - logit(A_reference - margin) over the delta method's error, by hand."""
    site = Site(seed=32)
    a, b = (stats.curve(site.model(0.9).probabilities[:, 0], site.labels[:, 0], np.arange(900), 900) for _ in range(2))
    covariance = np.array([[a.variance, stats.covariance(a, b)], [stats.covariance(a, b), b.variance]])
    held = b.value - 0.02
    slope = np.array([1 / (a.value * (1 - a.value)), -1 / (held * (1 - held))])
    by_hand = (log(a.value / (1 - a.value)) - log(held / (1 - held))) / sqrt(slope @ covariance @ slope)
    assert float(stats.statistic(a, b, -0.02)) == pytest.approx(by_hand)


def test_a_perfect_sample_does_not_claim_to_be_certain():
    labels = np.repeat([1.0, 0.0], [5, 20])
    perfect = stats.curve(labels + 0.1, labels, np.arange(25), 25)
    assert (perfect.value, perfect.level) == (1.0, 1 - 1 / 100)
    assert perfect.variance == pytest.approx(2 / 100**2)


def test_two_models_of_equal_auc_that_place_images_differently_are_not_the_same():
    labels = np.r_[np.ones(4), np.zeros(4)]
    a = stats.curve(np.array([8, 7, 6, 2.5, 4, 3, 2, 1.0]), labels, np.arange(8), 8)
    b = stats.curve(np.array([2.5, 7, 6, 8, 4, 3, 2, 1.0]), labels, np.arange(8), 8)
    assert a.value == b.value and not stats.same(a, b)
    assert stats.interval(a, b, 0.05) != (0.0, 0.0)


def test_the_macro_auc_varies_as_its_mean_over_patients_does():
    site = Site(samples=300, findings=("effusion", "opacity"), seed=3)
    site.labels[:, 1] = np.where(site.rng.random(300) < 0.5, site.labels[:, 0], site.labels[:, 1])
    site.shared[:, 1] = 0.7 * site.shared[:, 0] + 0.7 * site.shared[:, 1]
    scores = site.model(0.85, 0.75).probabilities
    both = stats.macro([stats.curve(scores[:, j], site.labels[:, j], np.arange(300), 300) for j in (0, 1)])
    assert both.value == pytest.approx(np.mean([auc(scores[:, j], site.labels[:, j]) for j in (0, 1)]))
    drawn = []
    for _ in range(800):
        pick = site.rng.integers(0, 300, 300)
        drawn.append(np.mean([auc(scores[pick, j], site.labels[pick, j]) for j in (0, 1)]))
    assert both.variance == pytest.approx(np.var(drawn), rel=0.15)


def test_holm_steps_down_and_stops_at_the_first_that_does_not_stand():
    assert stats.holm({"a": 0.012, "b": 0.02, "c": 0.04}, 0.05) == ["a", "b", "c"]
    assert stats.holm({"a": 0.012, "b": 0.03, "c": 0.04}, 0.05) == ["a"]
    assert stats.holm({"a": 0.02, "b": 0.02, "c": 0.02}, 0.05) == []
