"""What a model lost against an earlier one: for all patients, by view and by scanner."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from learner.evaluation import forgetting
from learner.evaluation.auc import auc
from learner.evaluation.verdict import Golden, Scores

FINDINGS = ("effusion", "nodule")


def drawn(images=400, seed=0, lose_on=None):
    """Return labels, scores of an earlier and a new model, and views; the new model is noise on the view `lose_on`."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((images, 2)) < 0.4).astype(float)
    before = labels + rng.normal(0, 0.8, labels.shape)
    after = before + rng.normal(0, 0.05, labels.shape)
    views = np.array(["PA", "AP"])[np.arange(images) % 2]
    if lose_on:
        after[views == lose_on, 0] = rng.normal(size=(views == lose_on).sum())
    return Golden(labels, [f"p{i}" for i in range(images)], FINDINGS), Scores(after), Scores(before), list(views)


def row(rows, group, value, finding):
    (found,) = [r for r in rows if (r.group, r.value, r.finding) == (group, value, finding)]
    return found


def test_a_loss_on_one_view_is_found_there_and_named():
    validation, after, before, views = drawn(lose_on="AP")
    rows = forgetting.changes(after, before, validation, {"view": views})
    lost, kept = row(rows, "view", "AP", "effusion"), row(rows, "view", "PA", "effusion")
    assert lost.ci and lost.ci[1] < 0 and lost.images == kept.images == 200
    at = np.array(views) == "AP"
    levels = [auc(scores.probabilities[at, 0], validation.labels[at, 0]) for scores in (before, after)]
    assert (lost.before, lost.after) == pytest.approx(levels)
    assert lost.difference == pytest.approx(levels[1] - levels[0])
    assert kept.ci and kept.ci[0] < 0 < kept.ci[1]
    assert row(rows, "view", "AP", "nodule").ci[1] > 0
    line = forgetting.line(rows)
    assert line.startswith("lost on ") and f"effusion AUC, view AP: {lost.difference:+.3f} [" in line
    assert "view PA" not in line
    json.dumps([asdict(r) for r in rows], allow_nan=False)


def test_equal_models_lose_nothing_and_the_line_gives_the_macro_auc():
    validation, _, before, views = drawn()
    rows = forgetting.changes(before, before, validation, {"view": views})
    assert {r.difference for r in rows} == {0.0}
    assert forgetting.line(rows) == "no loss shown; macro AUC: +0.000 [+0.000, +0.000]"


def test_few_patients_have_no_numbers_but_a_note():
    validation, after, before, _ = drawn(images=200)
    scanners = ["common"] * 180 + ["rare"] * 19 + [None]
    rows = forgetting.changes(after, before, validation, {"scanner": scanners})
    assert row(rows, "scanner", "common", "effusion").ci is not None
    rare = [r for r in rows if r.value == "rare"]
    assert [(r.finding, r.images, r.difference, r.note) for r in rare] == [(None, 19, None, "not enough data")]
    assert row(rows, "scanner", "not known", None).images == 1
    small = forgetting.changes(
        *(Scores(s.probabilities[:30]) for s in (after, before)),
        Golden(validation.labels[:30], validation.patients[:30], FINDINGS),
        {},
    )
    assert forgetting.line(small) == "not enough data"
    assert [r.note for r in small] == ["not enough data"] * 3


def test_patients_with_many_images_count_once():
    validation, after, before, views = drawn()
    few = Golden(validation.labels, [f"p{i // 20}" for i in range(400)], FINDINGS)
    assert forgetting.line(forgetting.changes(after, before, few, {"view": views})) == "not enough data"
