"""Every outcome the gate has, its edges, and the errors it raises."""

import json
from dataclasses import replace
from math import nan

import numpy as np
import pytest

from learner.evaluation import auc as stats
from learner.evaluation.gate import Rules, Scores, golden_power
from tests.support.learner.golden_scores import ALPHA, EASY, Site, row


def test_the_champion_itself_is_non_inferior_and_not_better():
    site = Site(seed=6)
    champion = site.model(0.9)
    verdict = site.judge(champion, champion, rules=Rules())
    same = row(verdict, "vs champion", "effusion")
    assert (same.outcome, same.observed, same.ci) == ("non_inferior", 0.0, (0.0, 0.0))
    assert row(verdict, "better somewhere").outcome == "inconclusive"
    assert verdict.outcome == "inconclusive"  # nothing is gained by deploying it
    assert site.judge(champion, champion).outcome == "passed"


@pytest.mark.parametrize("level", [0.6, 0.9, 0.97, 0.995])
def test_the_champion_on_another_scale_is_still_the_champion(level):
    site = Site(seed=7)
    champion = site.model(level)
    twin = Scores(champion.probabilities * 0.9 + 0.01)
    assert row(site.judge(twin, champion), "vs champion", "effusion").ci == (0.0, 0.0)


def test_a_perfect_candidate_is_better_and_every_number_stays_finite():
    site = Site(seed=8)
    perfect = Scores(0.1 + 0.65 * site.labels + 0.01 * site.rng.random(site.labels.shape))
    verdict = site.judge(perfect, site.model(0.85), rules=Rules())
    best = row(verdict, "vs champion", "effusion")
    assert (best.candidate, best.outcome, verdict.outcome) == (1.0, "better", "passed")
    assert np.isfinite(best.ci).all()
    json.dumps(verdict.to_json(), allow_nan=False)


def test_two_perfect_models_are_equals_and_the_opposite_of_perfect_is_worse():
    site = Site(seed=9)
    perfect, also = (Scores(0.1 + 0.65 * site.labels + 0.01 * site.rng.random(site.labels.shape)) for _ in range(2))
    assert row(site.judge(also, perfect), "vs champion", "effusion").outcome == "non_inferior"
    upside_down = Scores(1 - perfect.probabilities)
    verdict = site.judge(upside_down, perfect)
    assert row(verdict, "vs champion", "effusion").outcome == "worse"
    assert verdict.outcome == "failed"


def test_one_class_or_no_labels_is_inconclusive_and_says_how_many_patients_are_missing():
    site = Site(findings=("effusion", "nodule", "fracture"), seed=10)
    site.labels[:, 1] = 0.0
    site.labels[:, 2] = nan
    verdict = site.judge(
        site.model(0.9, 0.5, 0.5), site.model(0.9, 0.5, 0.5), rules=replace(EASY, must_show=("effusion",))
    )
    for finding in ("nodule", "fracture"):
        lone = row(verdict, "vs champion", finding)
        assert (lone.outcome, lone.observed, lone.ci, lone.needs) == ("inconclusive", None, None, 100)
    assert verdict.outcome in ("passed", "inconclusive")
    assert "NaN" not in json.dumps(verdict.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("sick", "shown", "decided"), [(29, False, False), (30, True, False), (99, True, False), (100, True, True)]
)
def test_thirty_patients_show_an_interval_and_a_hundred_decide(sick, shown, decided):
    site = Site(samples=600, seed=11)
    site.labels[:, 0] = np.arange(600) < sick
    for labels in (site.labels.copy(), 1 - site.labels):  # the smaller class, whichever it is
        site.labels = labels
        seen = row(site.judge(site.model(0.9, r=0.999), site.model(0.9, r=0.999)), "vs champion", "effusion")
        assert (seen.ci is not None, seen.outcome != "inconclusive") == (shown, decided)
        assert decided or seen.needs == 100 - sick
        assert decided or f"needs {100 - sick} more patients" in str(seen)


def test_four_images_of_a_patient_are_one_patient():
    site = Site(samples=600, per_patient=4, seed=12)
    site.labels[:, 0] = np.arange(600) < 240  # 240 images of 60 patients
    seen = row(site.judge(site.model(0.9), site.model(0.9)), "vs champion", "effusion")
    assert (seen.positives, seen.negatives, seen.needs) == (60, 90, 40)


def test_a_constant_score_fails():
    site = Site(seed=13)
    flat = Scores(np.full((900, 1), 0.3))
    verdict = site.judge(flat, site.model(0.9))
    assert row(verdict, "vs champion", "effusion").candidate == 0.5
    assert row(verdict, "vs champion", "effusion").outcome == "worse"
    assert row(verdict, "spread", "effusion").outcome == "fail"
    assert "label train images of both classes, or remove this finding" in verdict.line


# ------------------------------------------------------------------------------------------------------ the outcomes


def test_worse_than_the_champion_fails_and_the_line_gives_the_numbers():
    site = Site(seed=14)
    verdict = site.judge(site.model(0.80), site.model(0.90))
    bad = row(verdict, "vs champion", "effusion")
    assert verdict.outcome == "failed" and bad.outcome == "worse"
    assert verdict.line.startswith(
        f"failed: effusion AUC {bad.candidate:.3f} vs champion {bad.reference:.3f}: {bad.observed:+.3f} "
        f"[{bad.ci[0]:+.3f}, {bad.ci[1]:+.3f}], worse than the margin 0.02"
    )


def test_as_good_as_a_champion_that_slid_is_not_enough_for_the_baseline():
    site = Site(samples=3000, seed=15)
    baseline, champion = site.model(0.92, r=0.97), site.model(0.87, r=0.97)
    verdict = site.judge(site.model(0.868, r=0.97), champion, baseline)
    assert row(verdict, "vs champion", "effusion").outcome == "non_inferior"
    assert row(verdict, "vs baseline", "effusion").outcome == "worse"
    assert verdict.outcome == "failed"


def test_better_passes_where_superiority_is_required():
    site = Site(findings=("effusion", "opacity"), seed=16)
    verdict = site.judge(site.model(0.95, 0.9, r=0.99), site.model(0.88, 0.9, r=0.99), rules=Rules())
    assert row(verdict, "vs champion", "effusion").outcome == "better"
    assert row(verdict, "vs champion", "opacity").outcome == "non_inferior"
    assert verdict.outcome == "passed"
    assert "better on" in verdict.line and "effusion" in verdict.line


def test_no_difference_passes_only_where_non_inferiority_is_enough():
    site = Site(samples=3000, seed=17)
    candidate, champion = site.model(0.9, r=0.98), site.model(0.9, r=0.98)
    strict = site.judge(candidate, champion, rules=Rules())
    assert site.judge(candidate, champion, rules=EASY).outcome == "passed"
    assert strict.outcome == "inconclusive" and "not better than the champion on any finding" in strict.line


def test_a_small_set_that_cannot_tell_is_inconclusive_and_says_how_many_more():
    site = Site(samples=400, seed=18)
    verdict = site.judge(site.model(0.9, r=0.6), site.model(0.9, r=0.6))
    open_row = row(verdict, "vs champion", "effusion")
    assert verdict.outcome == "inconclusive" == open_row.outcome
    assert open_row.needs and open_row.needs > 100
    assert f"needs {open_row.needs} more patients" in verdict.line and "power" in verdict.line


def test_the_number_of_patients_asked_for_gives_the_power_promised():
    site = Site(samples=400, seed=18)
    candidate, champion = site.model(0.9, r=0.6), site.model(0.9, r=0.6)
    seen = row(site.judge(candidate, champion), "vs champion", "effusion")
    a, b = (stats.curve(s.probabilities[:, 0], site.labels[:, 0], np.arange(400), 400) for s in (candidate, champion))
    fewer = min(seen.positives, seen.negatives)
    grown = b.variance * fewer / (fewer + seen.needs)
    assert stats.power(b.value, grown, stats.correlation(a, b), 0.02, ALPHA) == pytest.approx(0.8, abs=0.003)


def test_an_interval_that_crosses_the_margin_below_zero_is_neither_worse_nor_shown():
    site = Site(samples=3000, seed=1)
    seen = row(site.judge(site.model(0.885, r=0.97), site.model(0.90, r=0.97), alpha=0.01), "vs champion", "effusion")
    assert seen.ci[0] < -0.02 < seen.ci[1] < 0
    assert seen.outcome == "inconclusive"


def test_an_inconclusive_finding_that_is_not_required_is_still_named():
    site = Site(samples=3000, findings=("effusion", "nodule"), seed=19)
    site.labels[:, 1] = np.arange(3000) < 40
    rules = replace(EASY, must_show=("effusion",))
    verdict = site.judge(site.model(0.9, 0.8, r=0.98), site.model(0.9, 0.8, r=0.98), rules=rules)
    assert verdict.outcome == "passed"
    assert "INCONCLUSIVE, not required: nodule" in verdict.line and "needs 60 more" in verdict.line
    everything = site.judge(site.model(0.9, 0.8, r=0.98), site.model(0.9, 0.8, r=0.98))
    assert everything.outcome == "inconclusive" and "nodule" in everything.line


def test_a_finding_that_is_not_required_still_fails_the_round_when_it_is_worse():
    site = Site(findings=("effusion", "opacity"), seed=20)
    rules = replace(EASY, must_show=("effusion",))
    verdict = site.judge(site.model(0.9, 0.7, r=0.99), site.model(0.9, 0.9, r=0.99), rules=rules)
    assert verdict.outcome == "failed" and "opacity" in verdict.line


def test_a_new_finding_is_inconclusive_and_does_not_stop_the_candidate():
    site = Site(samples=3000, findings=("effusion", "fracture"), seed=21)
    old = ("effusion",)
    candidate = site.model(0.9, 0.8, r=0.98)
    champion = site.model(0.9, r=0.98, findings=old)
    verdict = site.judge(candidate, champion)
    fresh = row(verdict, "vs champion", "fracture")
    assert (fresh.outcome, fresh.note) == ("inconclusive", "the champion has no score for it")
    assert verdict.outcome == "passed" and "fracture" in verdict.line
    named = site.judge(candidate, champion, rules=replace(EASY, must_show=("effusion", "fracture")))
    assert named.outcome == "inconclusive"


def test_a_reordered_vocabulary_is_compared_by_name():
    site = Site(samples=2000, findings=("effusion", "opacity"), seed=22)
    champion = site.model(0.95, 0.7)
    swapped = Scores(champion.probabilities[:, ::-1], ("opacity", "effusion"))
    assert row(site.judge(swapped, champion), "vs champion", "effusion").ci == (0.0, 0.0)


def test_a_candidate_that_dropped_every_finding_is_inconclusive():
    site = Site(seed=23)
    verdict = site.judge(Scores(np.zeros((900, 1)), ("hernia",)), site.model(0.9))
    assert verdict.outcome == "inconclusive" and "no finding in common" in verdict.line


# --------------------------------------------------------------------------------------------------- errors


def test_what_does_not_fit_the_golden_set_is_an_error_that_says_so():
    site = Site(seed=29)
    champion = site.model(0.9)
    with pytest.raises(ValueError, match=r"champion: scores are \(10, 1\)"):
        site.judge(champion, Scores(champion.probabilities[:10]))
    with pytest.raises(ValueError, match=r"baseline.*not finite"):
        site.judge(champion, champion, Scores(np.full((900, 1), nan)))
    with pytest.raises(ValueError, match="must_show 'hernia'"):
        site.judge(champion, champion, rules=Rules(must_show=("hernia",)))
    with pytest.raises(ValueError, match="alpha"):
        site.judge(champion, champion, alpha=0.0)


def test_a_verdict_is_the_same_for_the_same_scores_and_its_json_has_the_contracts_keys():
    site = Site(findings=("effusion", "opacity"), seed=30)
    candidate, champion = site.model(0.9, 0.9), site.model(0.9, 0.9)
    first, again = site.judge(candidate, champion), site.judge(candidate, champion)
    assert first == again
    written = json.loads(json.dumps(first.to_json(), allow_nan=False))
    assert written["outcome"] in ("passed", "failed", "inconclusive")
    for check in written["checks"]:
        assert {"name", "finding", "observed", "ci", "required", "outcome"} <= set(check)
        assert check["outcome"] in ("better", "non_inferior", "worse", "inconclusive", "ok", "fail")
        assert check["ci"] is None or len(check["ci"]) == 2


def test_golden_power_uses_the_measured_correlation():
    site = Site(samples=1200, findings=("effusion", "nodule"), seed=31)
    site.labels[:, 1] = np.arange(1200) < 40
    close = golden_power(site.model(0.9, 0.8, r=0.98), site.model(0.9, 0.8, r=0.98), site.golden, Rules(), ALPHA)
    apart = golden_power(site.model(0.9, 0.8, r=0.5), site.model(0.9, 0.8, r=0.5), site.golden, Rules(), ALPHA)
    assert close[0].correlation > 0.9 > apart[0].correlation > 0.2
    assert close[0].power > apart[0].power
    assert (close[1].positives, close[1].power) == (40, None)  # too few to decide at all
