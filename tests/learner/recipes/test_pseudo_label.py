"""Rounds of the recipe pseudo-label: inputs of teacher and student, parents, resuming."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.__main__ import main
from learner.data.augment import normalise, to_image
from learner.data.plates import label_table, read_plates
from learner.engine.checkpoint import read_file
from learner.networks.pooling import resize_matrix
from learner.objectives import pseudo_targets
from learner.recipes import pseudo_label
from learner.round.recipe import resolve
from learner.training.run import Run
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
from tests.support.learner.round_folders import card, make_round, result
from tests.support.learner.weights import copy_of, same

PSEUDO = {**CLASS_LOSS_ONLY, "method": "pseudo-label", "finetune_epochs": 2, "arch": CONVNET}
PHASES = {"t0": 4, "pseudo": 4, "finetune": 4}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_rounds(tmp_path_factory, {"pseudo-label": PSEUDO})("pseudo-label")


def test_each_phase_has_its_steps_and_two_models_are_exported(whole):
    check_phases(whole, PHASES)


def test_pausing_after_every_step_changes_no_bit(whole, tmp_path, monkeypatch):
    check_stopping_after_every_step(whole, make_round(tmp_path / "r", **PSEUDO), sum(PHASES.values()), monkeypatch)


def test_a_round_killed_in_training_and_restarted_equals_an_uninterrupted_one(whole, tmp_path):
    check_killed_and_restarted(whole, make_round(tmp_path / "r", checkpoint_seconds=0, **PSEUDO))


def test_the_served_network_is_the_student(whole):
    assert read_file(whole / "final/state.safetensors", tensors=False)[1]["plan"] == {"timm": CONVNET}


def test_a_round_without_labels_is_rejected(tmp_path):
    folder = make_round(tmp_path / "r", train=(0, 8), **PSEUDO)
    assert main([str(folder)]) == 3
    assert "no labelled train image" in result(folder)["reason"]
    assert not (folder / "t0").exists()


def test_the_note_has_the_share_of_pseudo_labels_and_no_invented_auc(whole):
    (note,) = [row for row in rows_of(whole) if row.get("kind") == "pseudo"]
    labels = read_file(whole / "checkpoint/pseudo-labels.safetensors")[0]["labels"]
    assert note["pseudo_rate"] == pytest.approx(1 - labels.isnan().float().mean().item(), rel=1e-5)
    assert note["pseudo_auc"] is None


def test_a_round_without_unlabelled_images_finetunes_its_teacher(tmp_path):
    folder = make_round(tmp_path / "r", train=(6, 0), validation=0, calibration=0, **PSEUDO)
    phases_of(folder)
    assert {row["phase"] for row in rows_of(folder)} == {"t0", "finetune"}


def test_the_teacher_is_the_network_that_the_parent_serves(tmp_path, monkeypatch):
    first = make_round(tmp_path / "first", serve="teacher", train=(4, 0), epochs=1, t0_epochs=1)
    assert main([str(first)]) == 0
    parent = {"bundle": "abc", "state": str(first / "final/state.safetensors")}
    folder, teachers = make_round(tmp_path / "r", parent=parent, **{**PSEUDO, "arch": "vit_tiny_patch8_depth1"}), []
    original = pseudo_label.pseudo_labels

    def watched(run, teacher, samples):
        teachers.append(copy_of(teacher))
        return original(run, teacher, samples)

    monkeypatch.setattr(pseudo_label, "pseudo_labels", watched)
    assert main([str(folder)]) == 0
    assert not (folder / "t0").exists()
    assert card(folder)["parent"] == "abc"
    served = read_file(first / "final/state.safetensors")[0]
    assert all(torch.equal(value, served[f"teacher.{key}"]) for key, value in teachers[0].items())


def test_a_parent_with_another_network_than_the_backbone_is_rejected(whole, tmp_path):
    parent = {"bundle": "abc", "state": str(whole / "t0/state.safetensors")}
    folder = make_round(tmp_path / "r", parent=parent, **{**PSEUDO, "arch": "vit_tiny_patch8_depth2"})
    assert main([str(folder)]) == 3
    assert "use the backbone that the parent was trained from" in result(folder)["reason"]


@pytest.mark.parametrize("profile", ["gpu", "cpu", "demo"])
def test_the_recipe_has_no_prototypes_and_no_local_views_in_any_profile(profile):
    recipe = resolve("pseudo-label", profile)
    assert (recipe.method, recipe.prototypes, recipe.local_views) == ("pseudo-label", 0, 0)


# -- properties of a step; MUTATIONS has a wrong version for each


def test_the_teacher_predicts_in_eval_mode_and_keeps_its_statistics(tmp_path):
    run = opened(tmp_path / "r", **PSEUDO)
    teacher = run.new_network()
    before, samples = copy_of(teacher), without_label(run)
    answers = pseudo_label.predict(run, teacher, samples)
    assert same(before, copy_of(teacher))
    assert teacher.training
    alone = pseudo_label.predict(
        run, teacher, samples[:1]
    )  # in train mode batch norm would depend on the other samples
    torch.testing.assert_close(alone, answers[:1])
    run.progress.close()


def test_true_labels_of_unlabelled_images_do_not_change_pseudo_labels(tmp_path):
    run = opened(tmp_path / "r", train=(6, 20), **PSEUDO)
    teacher, samples = run.new_network(), without_label(run)
    hidden = [replace(sample, labels=(1, 1)) for sample in samples]
    without_labels, with_labels = (
        pseudo_label.pseudo_labels(run, teacher, available) for available in (samples, hidden)
    )
    torch.testing.assert_close(without_labels, with_labels, equal_nan=True)
    run.progress.close()


def test_the_student_trains_only_on_pseudo_labels_of_unlabelled_images(tmp_path):
    folder, fed = make_round(tmp_path / "r", train=(6, 16), validation=0, kappa=0.3, **PSEUDO), {}
    feed = Run.feed

    def watched(run, samples, name, *rest):
        fed[name] = (samples, rest[2] if len(rest) > 2 else None)
        return feed(run, samples, name, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "feed", watched)
        phases_of(folder)
    samples, labels = fed["pseudo"]
    made = read_file(folder / "checkpoint/pseudo-labels.safetensors")[0]["labels"]
    assert not any(sample.labelled for sample in samples)
    assert len(made) == 16 > len(labels)
    torch.testing.assert_close(labels, made[(~made.isnan()).any(1)], equal_nan=True)
    assert all(sample.labelled for sample in fed["t0"][0] + fed["finetune"][0])


@pytest.mark.parametrize("flip", [False, True])
def test_predictions_are_the_mean_over_crops_mirrored_only_with_flip(tmp_path, flip):
    run = opened(tmp_path / "r", flip=flip, **{**PSEUDO, "arch": "vit_tiny_patch8_depth1"})
    teacher, samples = run.new_network().eval(), without_label(run)
    images = normalise(to_image(read_plates(samples), resize_matrix(512, 32)), run.recipe)
    side = 24  # 7/8 of 32, a multiple of the patch of 8
    boxes = [(0, 0), (0, 8), (8, 0), (8, 8), (4, 4)]
    views = [image[..., y : y + side, x : x + side] for image in (images, images.flip(-1)) for y, x in boxes]
    with torch.no_grad():
        each = [teacher.classify(view).sigmoid() for view in (views if flip else views[:5])]
    mine = pseudo_label.predict(run, teacher, samples, pseudo_label.crop_side(teacher, 32))
    torch.testing.assert_close(mine, torch.stack(each).mean(0))
    run.progress.close()


def test_the_first_of_the_best_epochs_is_kept(tmp_path):
    run = opened(tmp_path / "r", **PSEUDO)
    state = run.new_state("t0", run.schedule(run.labelled_feed("t0"), 1, 1e-3))
    for epoch, value in enumerate([0.6, 0.8, 0.8, 0.7]):
        torch.nn.init.constant_(state.student.cls_head.mlp[-1].bias, epoch)
        pseudo_label.keep_best(run, state, value)
    assert state.extra["auc"].item() == 0.8
    assert state.extra["best.cls_head.mlp.4.bias"].tolist() == [1.0, 1.0]
    run.progress.close()


def test_macro_auc_is_the_mean_over_findings_with_both_classes():
    scores = np.array([[0.1, 0.9, 0.5], [0.9, 0.1, 0.6], [0.5, 0.5, 0.7]])
    labels = np.array([[0, 1, 1], [1, 0, 1], [np.nan, 1, 1]], float)
    assert pseudo_label.macro_auc(scores, labels) == 1.0
    assert pseudo_label.macro_auc(scores[:, ::-1], 1 - labels[:, ::-1]) == 0.0
    assert pseudo_label.macro_auc(scores[:, 2:], labels[:, 2:]) is None


def in_train_mode(network, mode=True):
    return network.train()


def prevalence_of_the_scored(run, teacher, samples):
    scores = pseudo_label.predict(run, teacher, samples)
    labels = label_table(samples)
    return pseudo_targets.kappa_labels(scores, labels, run.recipe.kappa)


def always_ten(images, size):
    views = pseudo_targets.ten_crop(images, size)
    return torch.cat([views[5:], views[:5]])


def latest(run, state, value):
    state.extra = {"auc": torch.tensor(value)} | {f"best.{k}": v.clone() for k, v in state.student.state_dict().items()}


MUTATIONS = [
    ("test_the_teacher_predicts_in_eval_mode_and_keeps_its_statistics", "torch.nn.Module.eval", in_train_mode),
    (
        "test_true_labels_of_unlabelled_images_do_not_change_pseudo_labels",
        "learner.recipes.pseudo_label.pseudo_labels",
        prevalence_of_the_scored,
    ),
    (
        "test_the_student_trains_only_on_pseudo_labels_of_unlabelled_images",
        "learner.recipes.pseudo_label.labelled_rows",
        lambda labels: list(range(len(labels))),
    ),
    ("test_predictions_are_the_mean_over_crops_mirrored_only_with_flip", "learner.recipes.pseudo_label.ten_crop", always_ten),
    ("test_the_first_of_the_best_epochs_is_kept", "learner.recipes.pseudo_label.keep_best", latest),
    (
        "test_macro_auc_is_the_mean_over_findings_with_both_classes",
        "learner.recipes.pseudo_label.auc",
        lambda scores, labels: 0.5,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("test", "attribute", "wrong"), MUTATIONS)
def test_every_property_notices_its_mutation(monkeypatch, tmp_path, test, attribute, wrong):
    monkeypatch.setattr(attribute, wrong)
    available = {"tmp_path": tmp_path, "flip": False}
    wanted = inspect.signature(globals()[test]).parameters
    with pytest.raises(AssertionError):
        globals()[test](**{name: available[name] for name in wanted})
