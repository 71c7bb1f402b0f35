"""The gate's checks besides the AUC: broken scores, prevalence, parity, checks from elsewhere."""

import json
from math import nan

import numpy as np
import pytest

from learner.evaluation.gate import Check, Scores
from tests.support.learner.golden_scores import Site, row


@pytest.mark.parametrize("broken", [nan, np.inf, 1.2, -0.1])
def test_scores_that_are_no_probabilities_fail(broken):
    site = Site(seed=24)
    candidate = site.model(0.9)
    candidate.probabilities[7, 0] = broken
    verdict = site.judge(candidate, site.model(0.9))
    assert verdict.outcome == "failed" and row(verdict, "finite", "effusion").outcome == "fail"
    assert np.isfinite(broken) or row(verdict, "vs champion", "effusion").note == "scores are not finite"
    json.dumps(verdict.to_json(), allow_nan=False)


@pytest.mark.parametrize("share", [0.2, 0.8])
@pytest.mark.parametrize("shift", [-2.0, 2.0])
def test_a_candidate_that_calls_everybody_or_nobody_positive_fails_on_prevalence(share, shift):
    site = Site(share=share, seed=25)
    champion = site.model(0.9)
    odds = np.log(champion.probabilities / (1 - champion.probabilities))
    shifted = Scores(1 / (1 + np.exp(-odds - shift)))  # the same order, so the AUC is the same
    verdict = site.judge(shifted, champion)
    assert row(verdict, "vs champion", "effusion").outcome == "non_inferior"
    assert row(verdict, "prevalence", "effusion").outcome == "fail" and verdict.outcome == "failed"
    assert row(site.judge(champion, champion), "prevalence", "effusion").outcome == "ok"


def test_an_inverted_teacher_is_caught_however_confident_its_student_is():
    site = Site(seed=26)
    champion = site.model(0.9)
    poisoned = Scores(1 - champion.probabilities)
    verdict = site.judge(poisoned, champion)
    assert verdict.outcome == "failed" and "worse than the margin" in verdict.line


@pytest.mark.parametrize(
    ("parity", "outcome"),
    [
        ({"1": 1e-3, "8": 2e-6}, "ok"),
        ({"1": 2e-6, "8": 1.1e-3}, "fail"),
        ({"1": 2e-6, "8": nan}, "fail"),
        (None, "fail"),
        ({"images": 3}, "fail"),
    ],
)
def test_parity_is_checked_at_every_batch_size_and_must_be_measured(parity, outcome):
    site = Site(seed=27)
    champion = site.model(0.9)
    verdict = site.judge(champion, champion, parity=parity)
    seen = row(verdict, "parity")
    assert seen.outcome == outcome
    assert seen.observed is None or seen.observed == max(v for k, v in parity.items() if k != "images")
    assert verdict.outcome == ("passed" if outcome == "ok" else "failed")


def test_rows_measured_elsewhere_count_like_the_gates_own():
    site = Site(seed=28)
    champion = site.model(0.9)
    replay = Check("replay", None, 0.31, None, "<= 0.05 of images flip", "fail")
    verdict = site.judge(champion, champion, measured=(replay,))
    assert verdict.outcome == "failed" and "replay 0.31, required <= 0.05 of images flip" in verdict.line


def test_a_subgroup_with_too_little_data_is_named_and_does_not_stop_the_candidate():
    site = Site(seed=28)
    champion = site.model(0.9)
    small = Check(
        "age 18-40", "effusion", -0.01, (-0.2, 0.2), "upper bound >= -0.02", "inconclusive", note="12 patients"
    )
    verdict = site.judge(champion, champion, measured=(small,))
    assert verdict.outcome == "passed" and "INCONCLUSIVE, not required: effusion age 18-40" in verdict.line
    worse = Check("age 18-40", "effusion", -0.1, (-0.2, -0.05), "upper bound >= -0.02", "worse")
    assert site.judge(champion, champion, measured=(worse,)).outcome == "failed"
