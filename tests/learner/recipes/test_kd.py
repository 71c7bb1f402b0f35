"""Rounds of the recipe kd: strategies, different networks, parents, resuming, steps in parts."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.__main__ import main
from learner.engine.checkpoint import read_file
from learner.engine.progress import ProgressWriter
from learner.engine.step import Batch
from learner.objectives.class_losses import label_loss
from learner.objectives.distl_steps import supervised_step
from learner.objectives.knowledge_distillation import bernoulli_kl
from learner.recipes import kd
from learner.round.recipe import resolve
from tests.support.learner.recipe_rounds import (
    CLASS_LOSS_ONLY,
    CONVNET,
    check_killed_and_restarted,
    check_phases,
    check_stopping_after_every_step,
    opened,
    phases_of,
    rows_of,
    whole_rounds,
    without_label,
)
from tests.support.learner.round_folders import make_round, result
from tests.support.learner.weights import copy_of, same

KD = {**CLASS_LOSS_ONLY, "method": "kd", "kd_teacher": CONVNET}
CASES = {
    "standard": KD,  # the teacher is a convolutional network, the student a transformer
    "reversed": {**KD, "kd_strategy": "reversed"},
    "self": {**KD, "kd_strategy": "self", "arch": CONVNET},
}
PHASES = {
    "standard": {"t0": 4, "teacher": 4, "kd": 4},
    "reversed": {"t0": 4, "kd": 4},
    "self": {"t0": 4, "kd": 4},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_rounds(tmp_path_factory, CASES)


@pytest.mark.parametrize("case", CASES)
def test_each_phase_has_its_steps_and_two_models_are_exported(whole, case):
    check_phases(whole(case), PHASES[case])


@pytest.mark.parametrize("case", CASES)
def test_pausing_after_every_step_changes_no_bit(whole, tmp_path, monkeypatch, case):
    folder, steps = make_round(tmp_path / "r", **CASES[case]), sum(PHASES[case].values())
    check_stopping_after_every_step(whole(case), folder, steps, monkeypatch)


def test_a_round_killed_in_training_and_restarted_equals_an_uninterrupted_one(whole, tmp_path):
    check_killed_and_restarted(whole("standard"), make_round(tmp_path / "r", checkpoint_seconds=0, **KD))


@pytest.mark.parametrize("case", CASES)
def test_the_served_network_is_the_student(whole, case):
    plan = read_file(whole(case) / "final/state.safetensors", tensors=False)[1]["plan"]
    assert plan.get("timm") == (None if case == "standard" else CONVNET)


def test_a_round_without_labels_is_rejected(tmp_path):
    folder = make_round(tmp_path / "r", train=(0, 8), **KD)
    assert main([str(folder)]) == 3
    assert "no labelled train image" in result(folder)["reason"]
    assert not (folder / "t0").exists()


@pytest.mark.parametrize("strategy", ["base", "standard", "self"])
def test_kd_starts_from_a_parent(whole, tmp_path, strategy):
    """The parent is the student, in "self" the teacher of a new student."""
    state = whole("standard") / "final/state.safetensors"
    parent, begun = {"bundle": "abc", "state": str(state)}, []
    folder = make_round(tmp_path / "r", parent=parent, **KD, kd_strategy=strategy)
    step = ProgressWriter.write_step

    def watched(progress, state, losses):
        if state.phase == "kd" and state.step == 1:  # the first step has a learning rate of 0
            begun.append(copy_of(state.student))
        step(progress, state, losses)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressWriter, "write_step", watched)
        phases_of(folder)
    served = {k.removeprefix("student."): v for k, v in read_file(state)[0].items() if k.startswith("student.")}
    assert same(begun[0], served) == (strategy != "self")
    assert {row["phase"] for row in rows_of(folder)} == {"kd"} | ({"teacher"} if strategy == "standard" else set())


def test_reversed_rejects_a_parent(whole, tmp_path):
    parent = {"bundle": "abc", "state": str(whole("standard") / "t0/state.safetensors")}
    folder = make_round(tmp_path / "r", parent=parent, **KD, kd_strategy="reversed")
    assert main([str(folder)]) == 3
    assert 'use "standard"' in result(folder)["reason"]


def test_a_teacher_of_another_image_size_is_rejected_before_training(tmp_path):
    folder = make_round(tmp_path / "r", **{**KD, "kd_teacher": "vit_tiny_patch7_depth1"})
    assert main([str(folder)]) == 3
    assert "no multiple of its patch 7" in result(folder)["reason"]
    assert not (folder / "t0").exists()


@pytest.mark.parametrize("profile", ["gpu", "cpu", "demo"])
def test_the_recipe_has_no_prototypes_and_no_local_views_in_any_profile(profile):
    recipe = resolve("kd", profile)
    assert (recipe.method, recipe.prototypes, recipe.local_views) == ("kd", 0, 0)


# -- properties of a step; MUTATIONS has a wrong version for each


def test_the_teacher_of_kd_does_not_change_and_is_in_eval_mode(tmp_path):
    folder, seen = make_round(tmp_path / "r", **KD, validation=0, calibration=0), []
    step = kd.kd_step

    def watched(state, teacher, feeds, balance):
        before = copy_of(teacher)
        losses = step(state, teacher, feeds, balance)
        seen.append(not teacher.training and same(before, copy_of(teacher)))
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kd, "kd_step", watched)
        phases_of(folder)
    assert seen == [True] * 4


def kd_step(run, feeds, teacher=None, **recipe):
    """Return the losses of a step with a copy of the student as teacher, and the student after it."""
    run.recipe = replace(run.recipe, drop_path=0.0, **recipe)
    state = run.new_state("kd", run.schedule(feeds[0], 2, 1e-3))
    run.from_weights(None)(state)
    state.step = 1  # at step 0 the learning rate is 0
    teacher = (teacher or state.teacher).eval()
    return kd.kd_step(state, teacher, feeds), state


def test_unlabelled_images_have_only_the_distillation_loss(tmp_path):
    run = opened(tmp_path / "r", **KD)
    teacher = run.new_network()
    torch.nn.init.constant_(teacher.cls_head.mlp[-1].bias, 2.0)
    labelled, rest = run.labelled_feed("t0"), run.feed(without_label(run), "unlabelled", 0, False)
    both, _ = kd_step(run, [labelled, rest], teacher)
    alone, _ = kd_step(run, [labelled], teacher)
    none, _ = kd_step(run, [rest], teacher)
    assert both["classes"] == pytest.approx(alone["classes"], rel=1e-6)
    assert none["classes"] == 0
    sizes = [feed.batch(0, 1).size for feed in (labelled, rest)]
    mean = (alone["taught"] * sizes[0] + none["taught"] * sizes[1]) / sum(sizes)
    assert both["taught"] == pytest.approx(mean, rel=1e-5)
    assert alone["loss"] == pytest.approx(0.5 * alone["classes"] + 0.5 * alone["taught"], rel=1e-6)
    run.progress.close()


def test_a_step_in_parts_has_the_loss_of_a_whole_one(tmp_path):
    run = opened(tmp_path / "r", **KD)
    teacher = run.new_network()
    torch.nn.init.constant_(teacher.cls_head.mlp[-1].bias, 2.0)
    feeds = [run.labelled_feed("t0"), run.feed(without_label(run), "unlabelled", 0, False)]
    whole, in_one_part = kd_step(run, feeds, teacher)
    parts, in_parts = kd_step(run, feeds, teacher, micro_batch=1)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    # compare gradients, not weights: Adam turns the rounding of a zero gradient into a full step
    for mine, theirs in zip(in_one_part.student.parameters(), in_parts.student.parameters(), strict=True):
        if mine.grad is not None and theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    run.progress.close()


def test_the_loss_is_the_bernoulli_form_on_the_same_view(tmp_path):
    run = opened(tmp_path / "r", **KD)
    teacher = run.new_network().eval()
    torch.nn.init.constant_(teacher.cls_head.mlp[-1].bias, 2.0)
    feed = run.labelled_feed("t0")
    state = run.new_state("kd", run.schedule(feed, 2, 1e-3))
    state.student.eval()
    batch: Batch = feed.batch(0, 0)
    everything = slice(0, batch.size)
    terms = kd.kd_objective(teacher, 1.0, {})(state, batch, everything)
    view = batch.views(everything)[1]
    student_logits, teacher_logits = state.student.classify(view), teacher.classify(view)
    expected = 0.5 * label_loss(student_logits, batch.labels) + 0.5 * bernoulli_kl(student_logits, teacher_logits, 2.0)
    torch.testing.assert_close(terms.loss, expected)
    assert expected - 0.5 * label_loss(student_logits, batch.labels) > 0.1
    run.progress.close()


def test_a_step_with_alpha_zero_is_a_supervised_step(tmp_path):
    run = opened(tmp_path / "r", **KD)
    feed = run.labelled_feed("t0")
    _, taught = kd_step(run, [feed], kd_alpha=0.0)
    alone = run.new_state("kd", run.schedule(feed, 2, 1e-3))
    run.from_weights(None)(alone)
    alone.step = 1
    supervised_step(alone, feed)
    for mine, theirs in zip(taught.student.parameters(), alone.student.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-5)
    run.progress.close()


def test_a_defective_teacher_has_the_first_quarter_of_the_schedule(tmp_path):
    run = opened(tmp_path / "r", **KD)
    whole = run.schedule(run.labelled_feed("t0"), 8, 1e-3)
    short = kd.first_quarter(whole)
    assert short.steps == whole.steps // 4
    np.testing.assert_array_equal(short.lr, whole.lr[: short.steps])
    assert kd.first_quarter(run.schedule(run.labelled_feed("t0"), 3, 1e-3)).steps == whole.steps_per_epoch
    run.progress.close()


def in_train_mode(network, mode=True):
    return network.train()


def unshared(teacher, share, balance):
    return TEACHING(teacher, 1.0, balance)


TEACHING = kd.kd_objective
MUTATIONS = [
    ("test_the_teacher_of_kd_does_not_change_and_is_in_eval_mode", "torch.nn.Module.eval", in_train_mode),
    ("test_unlabelled_images_have_only_the_distillation_loss", "learner.recipes.kd.kd_objective", unshared),
    ("test_a_step_in_parts_has_the_loss_of_a_whole_one", "learner.recipes.kd.share_of", lambda batch, part: 1.0),
    (
        "test_the_loss_is_the_bernoulli_form_on_the_same_view",
        "learner.objectives.knowledge_distillation.bernoulli_kl",
        lambda student, teacher, temperature: bernoulli_kl(student, teacher, 1.0),
    ),
    (
        "test_a_step_with_alpha_zero_is_a_supervised_step",
        "learner.objectives.knowledge_distillation.label_loss",
        lambda student_logits, labels, known: label_loss(student_logits, 1 - labels, known),
    ),
    ("test_a_defective_teacher_has_the_first_quarter_of_the_schedule", "learner.recipes.kd.first_quarter", lambda whole: whole),
]  # fmt: skip


@pytest.mark.parametrize(("test", "attribute", "wrong"), MUTATIONS)
def test_every_property_notices_its_mutation(monkeypatch, tmp_path, test, attribute, wrong):
    monkeypatch.setattr(attribute, wrong)
    available = {"tmp_path": tmp_path, "flip": False}
    wanted = inspect.signature(globals()[test]).parameters
    with pytest.raises(AssertionError):
        globals()[test](**{name: available[name] for name in wanted})
