"""A candidate beside raw pixels: the rows, their words, and that they decide nothing."""

import json
from dataclasses import replace
from math import nan

import numpy as np
import pytest

from learner.evaluation import floor, pixel_baseline
from learner.evaluation.auc import auc
from learner.evaluation.gate import Rules, judge
from learner.evaluation.label_table import LabelTable
from tests.support.learner.golden_scores import ALPHA, EASY, FINE, Site, row

FINDINGS = ("effusion", "nodule")


def beside(site, candidate, pixels, rules=EASY):
    return judge(candidate, candidate, candidate, site.golden, rules, ALPHA, FINE, floor=pixels)


def test_each_finding_and_the_macro_auc_have_a_row_with_the_paired_difference():
    site = Site(findings=FINDINGS, seed=1)
    good, pixels = site.model(0.9, 0.8), site.model(0.7, 0.6)
    verdict = beside(site, good, pixels)
    levels = [[auc(model.probabilities[:, i], site.labels[:, i]) for i in (0, 1)] for model in (good, pixels)]
    for i, finding in enumerate(FINDINGS):
        seen = row(verdict, "vs raw pixels", finding)
        assert (seen.candidate, seen.reference) == pytest.approx((levels[0][i], levels[1][i]))
        assert seen.outcome == "better" and seen.ci and 0 < seen.ci[0] < seen.observed < seen.ci[1]
    macro = row(verdict, "vs raw pixels")
    assert (macro.candidate, macro.reference) == pytest.approx((np.mean(levels[0]), np.mean(levels[1])))
    assert verdict.line.endswith("; better than raw pixels")
    json.dumps(verdict.to_json(), allow_nan=False)


def test_the_interval_is_that_of_patients_drawn_again():
    site = Site(samples=600, per_patient=3, seed=2)
    candidate, pixels = site.model(0.85, r=0.5), site.model(0.8, r=0.5)
    seen = row(beside(site, candidate, pixels), "vs raw pixels", "effusion")
    rng, drawn = np.random.default_rng(0), []
    for _ in range(2000):
        at = (rng.integers(0, 200, 200)[:, None] * 3 + np.arange(3)).ravel()
        drawn.append(
            auc(candidate.probabilities[at, 0], site.labels[at, 0])
            - auc(pixels.probabilities[at, 0], site.labels[at, 0])
        )
    assert seen.ci == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.008)


@pytest.mark.parametrize("rules", [EASY, Rules()])
def test_a_candidate_below_raw_pixels_has_the_same_outcome_and_a_line_that_says_so(rules):
    site = Site(findings=FINDINGS, seed=3)
    weak, pixels = site.model(0.6, 0.8), site.model(0.9, 0.8, r=0.9)
    plain, shown = beside(site, weak, None, rules), beside(site, weak, pixels, rules)
    assert shown.outcome == plain.outcome
    assert shown.checks[: len(plain.checks)] == plain.checks
    worse = row(shown, "vs raw pixels", "effusion")
    assert worse.outcome == "worse" and worse.ci and worse.ci[1] < 0
    assert row(shown, "vs raw pixels", "nodule").outcome == "inconclusive"
    assert shown.line.startswith(plain.line + "; worse than raw pixels: macro AUC ")
    assert shown.line.endswith("not shown better than raw pixels: nodule")
    assert f"effusion AUC {worse.candidate:.3f} vs raw pixels {worse.reference:.3f}" in floor.alert(shown.checks)


def test_no_alert_where_the_interval_holds_0():
    site = Site(seed=4)
    verdict = beside(site, site.model(0.8), site.model(0.8))
    assert row(verdict, "vs raw pixels").outcome == "inconclusive"
    assert floor.alert(verdict.checks) is None
    assert verdict.line.endswith("; not shown better than raw pixels: macro AUC, effusion")


def test_a_finding_that_nothing_is_known_of_has_a_row_with_the_reason_and_no_interval():
    site = Site(findings=("effusion", "nodule", "fracture", "mass"), seed=5)
    site.labels[:, 2] = np.arange(900) < 29
    site.labels[:, 3] = 0.0
    pixels = site.model(0.7, 0.7, 0.7, 0.5)
    pixels.probabilities[:, 1] = nan
    candidate = site.model(0.8, 0.8, 0.8, 0.5)
    verdict = beside(site, candidate, pixels)
    rows = {finding: row(verdict, "vs raw pixels", finding) for finding in site.findings}
    assert rows["effusion"].ci is not None
    assert (rows["nodule"].ci, rows["nodule"].note) == (None, "no labelled train images of both classes")
    assert (rows["fracture"].ci, rows["fracture"].note) == (None, "needs 1 more patients of the smaller class")
    assert rows["fracture"].observed is not None and rows["mass"].observed is None
    macro = row(verdict, "vs raw pixels")  # over the findings with an interval
    assert (macro.candidate, macro.reference) == (rows["effusion"].candidate, rows["effusion"].reference)
    broken = replace(candidate, probabilities=np.where(np.arange(900)[:, None] == 5, nan, candidate.probabilities))
    table = LabelTable(site.golden)
    assert {seen.outcome for seen in floor.against_floor(broken, pixels, table)} == {"inconclusive"}


def test_a_long_line_names_the_first_findings_and_counts_the_others():
    names = tuple("abcdefgh")
    site = Site(findings=names, seed=6)
    same = site.model(*[0.7] * 8)
    line = floor.line(floor.against_floor(same, same, LabelTable(site.golden)))
    assert line == "not shown better than raw pixels: macro AUC, a, b, c, d and 4 more"


def test_scores_learn_from_train_images_and_leave_out_findings_of_one_class():
    rng = np.random.default_rng(7)
    train, test = rng.normal(size=(80, 12)), rng.normal(size=(30, 12))
    labels = np.c_[train[:, 0] > 0, np.ones(80), np.full(80, nan), np.zeros(80)].astype(float)
    made = floor.scores(train, labels, test, ("a", "b", "c", "d"))
    alone = pixel_baseline.fit(train, labels[:, :1]).scores(test)
    assert made.probabilities[:, 0] == pytest.approx(alone[:, 0])
    assert auc(made.probabilities[:, 0], (test[:, 0] > 0).astype(float)) > 0.8
    assert np.isnan(made.probabilities[:, 1:]).all()
    nothing = floor.scores(np.empty((0, 12)), np.empty((0, 4)), test, ("a", "b", "c", "d"))
    assert nothing.probabilities.shape == (30, 4) and np.isnan(nothing.probabilities).all()


def test_thumbnails_of_parts_are_those_of_the_whole():
    plates = np.random.default_rng(8).integers(0, 255, (floor.PART + 3, 48, 60)).astype(np.uint8)
    parts = floor.thumbnails(len(plates), lambda low, high: plates[low:high])
    assert np.array_equal(parts, pixel_baseline.thumbnails(plates))
    assert floor.thumbnails(0, lambda low, high: plates[low:high]).shape == (0, 576)
