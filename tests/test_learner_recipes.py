"""Rounds of the recipes pseudo-label and kd: between two kinds of network, resumed at any step, and without any leak."""

import inspect
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from learner import targets
from learner.__main__ import main
from learner.checkpoint import read_file
from learner.correct import supervise
from learner.data import label_table, read_plates
from learner.kd import bernoulli_kl
from learner.progress import Teller
from learner.pseudo import label_loss
from learner.recipe import resolve
from learner.recipes import kd, pseudo_label
from learner.round_dir import load
from learner.run import Run
from learner.step import Batch
from learner.views import normalise, resize_matrix, to_image
from tests.learner_site import card, make_round, result
from tests.test_learner_round import same_weights, start, wait_for

ALONE = {"prototypes": 0, "local_views": 0, "init": "mimetic"}
CONVNET = "test_resnet"  # a residual net of .4 million weights, with batch norm
PSEUDO = {**ALONE, "method": "pseudo-label", "finetune_epochs": 2, "arch": CONVNET}
KD = {**ALONE, "method": "kd", "kd_teacher": CONVNET}
CASES = {
    "pseudo-label": PSEUDO,
    "standard": KD,  # a convolutional net teaches a transformer
    "reversed": {**KD, "kd_strategy": "reversed"},
    "self": {**KD, "kd_strategy": "self", "arch": CONVNET},
}
PHASES = {
    "pseudo-label": {"t0": 4, "pseudo": 4, "finetune": 4},
    "standard": {"t0": 4, "teacher": 4, "kd": 4},
    "reversed": {"t0": 4, "kd": 4},
    "self": {"t0": 4, "kd": 4},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a first round of a case, run to its end once."""
    made = {}

    def folder_of(case):
        if case not in made:
            made[case] = make_round(tmp_path_factory.mktemp("whole") / "r", **CASES[case])
            assert main([str(made[case])]) == 0
        return made[case]

    return folder_of


class Bare(Run):
    """A run that writes no bundle: where only its phases are looked at."""

    def export(self, name, state, serve, chosen=None, plan=None):
        pass


def phases_of(folder, recipe):
    """All phases of a recipe on a round folder."""
    run = Bare(load(folder))
    try:
        recipe.run(run)
    finally:
        run.teller.close()


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def opened(folder, **overrides):
    """A run on a new round, before its first phase."""
    make_round(folder, **overrides)
    return Run(load(folder))


def without_label(run):
    return [film for film in run.round.unlabelled if not film.labelled]


def copy_of(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


# -- whole rounds


@pytest.mark.parametrize("case", CASES)
def test_each_phase_has_its_steps_and_leaves_two_models(whole, case):
    folder = whole(case)
    steps = [row["phase"] for row in rows_of(folder) if "kind" not in row]
    assert {phase: steps.count(phase) for phase in steps} == PHASES[case]
    assert sorted(path.name for path in (folder / "final").iterdir()) == sorted(
        path.name for path in (folder / "t0").iterdir()
    )
    assert card(folder, "t0")["phase"] == "t0"
    assert card(folder)["phase"] == list(PHASES[case])[-1]


@pytest.mark.parametrize("case", CASES)
def test_h_stopping_after_every_single_step_changes_no_bit(whole, tmp_path, monkeypatch, case):
    """Through batch norm's statistics, the best epoch so far and a teacher of another kind; bitwise, on the CPU."""
    reference = whole(case)
    folder, starts = make_round(tmp_path / "r", **CASES[case]), 0
    step = Teller.step

    def step_and_ask(teller, state, losses):
        step(teller, state, losses)
        teller.asked = "one step"

    monkeypatch.setattr(Teller, "step", step_and_ask)
    while (code := main([str(folder)])) == 75:
        starts += 1
    assert code == 0
    assert starts == sum(PHASES[case].values())
    for model in ("t0", "final"):
        assert same_weights(reference / model / "state.safetensors", folder / model / "state.safetensors")
    untimed = [[{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(f)] for f in (reference, folder)]
    assert untimed[0] == untimed[1]


@pytest.mark.parametrize("case", ["pseudo-label", "standard"])
def test_killed_while_the_student_learns_and_restarted_equals_the_uninterrupted_one(whole, tmp_path, case):
    reference = whole(case)
    folder = make_round(tmp_path / "r", checkpoint_seconds=0, **CASES[case])
    process = start(folder)
    wait_for(folder / "t0/state.safetensors", process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "final").exists()
    assert main([str(folder)]) == 0
    assert same_weights(reference / "final/state.safetensors", folder / "final/state.safetensors")
    assert len(rows_of(folder)) == len(rows_of(reference))


@pytest.mark.parametrize("case", CASES)
def test_the_served_network_is_the_taught_one(whole, case):
    plan = read_file(whole(case) / "final/state.safetensors", tensors=False)[1]["plan"]
    assert plan.get("timm") == (None if case == "standard" else CONVNET)


def test_what_the_teacher_labelled_is_told_and_its_quality_is_not_made_up(whole):
    (note,) = [row for row in rows_of(whole("pseudo-label")) if row.get("kind") == "pseudo"]
    labels = read_file(whole("pseudo-label") / "checkpoint/pseudo-labels.safetensors")[0]["labels"]
    assert note["pseudo_rate"] == pytest.approx(1 - labels.isnan().float().mean().item(), rel=1e-5)
    assert note["pseudo_auc"] is None


@pytest.mark.parametrize("case", ["pseudo-label", "standard"])
def test_round_without_labels_is_refused(tmp_path, case):
    folder = make_round(tmp_path / "r", train=(0, 8), **CASES[case])
    assert main([str(folder)]) == 3
    assert "no labelled train film" in result(folder)["reason"]
    assert not (folder / "t0").exists()


def test_round_without_an_unlabelled_film_finetunes_its_teacher(tmp_path):
    folder = make_round(tmp_path / "r", train=(6, 0), validation=0, calibration=0, **PSEUDO)
    phases_of(folder, pseudo_label)
    assert {row["phase"] for row in rows_of(folder)} == {"t0", "finetune"}


def test_pseudo_label_goes_on_with_the_parents_served_network_as_teacher(tmp_path, monkeypatch):
    first = make_round(tmp_path / "first", serve="teacher", train=(4, 0), epochs=1, t0_epochs=1)
    assert main([str(first)]) == 0
    parent = {"bundle": "abc", "state": str(first / "final/state.safetensors")}
    folder, teachers = make_round(tmp_path / "r", parent=parent, **{**PSEUDO, "arch": "vit_tiny_patch8_depth1"}), []
    asked = pseudo_label.pseudo_labels

    def watched(run, teacher, films):
        teachers.append(copy_of(teacher))
        return asked(run, teacher, films)

    monkeypatch.setattr(pseudo_label, "pseudo_labels", watched)
    assert main([str(folder)]) == 0
    assert not (folder / "t0").exists()
    assert card(folder)["parent"] == "abc"
    served = read_file(first / "final/state.safetensors")[0]
    assert all(torch.equal(value, served[f"teacher.{key}"]) for key, value in teachers[0].items())


def test_pseudo_labels_parent_of_another_network_than_the_backbone_is_refused(whole, tmp_path):
    parent = {"bundle": "abc", "state": str(whole("pseudo-label") / "t0/state.safetensors")}
    folder = make_round(tmp_path / "r", parent=parent, **{**PSEUDO, "arch": "vit_tiny_patch8_depth2"})
    assert main([str(folder)]) == 3
    assert "give the one the parent began with" in result(folder)["reason"]


@pytest.mark.parametrize("strategy", ["base", "standard", "self"])
def test_kd_goes_on_from_a_parent(whole, tmp_path, strategy):
    """As the student, but in `self` as the teacher of one that starts anew."""
    state = whole("standard") / "final/state.safetensors"
    parent, begun = {"bundle": "abc", "state": str(state)}, []
    folder = make_round(tmp_path / "r", parent=parent, **KD, kd_strategy=strategy)
    step = Teller.step

    def watched(teller, state, losses):
        if state.phase == "kd" and state.step == 1:  # the first step has a learning rate of 0
            begun.append(copy_of(state.student))
        step(teller, state, losses)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teller, "step", watched)
        phases_of(folder, kd)
    served = {k.removeprefix("student."): v for k, v in read_file(state)[0].items() if k.startswith("student.")}
    assert same(begun[0], served) == (strategy != "self")
    assert {row["phase"] for row in rows_of(folder)} == {"kd"} | ({"teacher"} if strategy == "standard" else set())


def test_reversed_has_no_parent(whole, tmp_path):
    parent = {"bundle": "abc", "state": str(whole("standard") / "t0/state.safetensors")}
    folder = make_round(tmp_path / "r", parent=parent, **KD, kd_strategy="reversed")
    assert main([str(folder)]) == 3
    assert 'use "standard"' in result(folder)["reason"]


def test_teacher_that_cannot_see_the_films_is_refused_before_anything_is_trained(tmp_path):
    folder = make_round(tmp_path / "r", **{**KD, "kd_teacher": "vit_tiny_patch7_depth1"})
    assert main([str(folder)]) == 3
    assert "no multiple of its patch 7" in result(folder)["reason"]
    assert not (folder / "t0").exists()


@pytest.mark.parametrize("name", ["pseudo-label", "kd"])
@pytest.mark.parametrize("profile", ["gpu", "cpu", "demo"])
def test_these_recipes_carry_no_prototypes_and_no_crops_at_any_size(name, profile):
    recipe = resolve(name, profile)
    assert (recipe.method, recipe.prototypes, recipe.local_views) == (name, 0, 0)


# -- what no step may do; each is told to fail in MUTATIONS


def test_teacher_labels_in_eval_mode_and_keeps_its_statistics(tmp_path):
    run = opened(tmp_path / "r", **PSEUDO)
    teacher = run.network()
    before, films = copy_of(teacher), without_label(run)
    answers = pseudo_label.answers(run, teacher, films)
    assert same(before, copy_of(teacher))
    assert teacher.training
    alone = pseudo_label.answers(run, teacher, films[:1])  # batch norm would see the company in train mode
    torch.testing.assert_close(alone, answers[:1])
    run.teller.close()


def test_teacher_of_kd_stands_still_in_eval_mode(tmp_path):
    folder, seen = make_round(tmp_path / "r", **KD, validation=0, calibration=0), []
    step = kd.be_taught

    def watched(state, teacher, feeds):
        before = copy_of(teacher)
        losses = step(state, teacher, feeds)
        seen.append(not teacher.training and same(before, copy_of(teacher)))
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kd, "be_taught", watched)
        phases_of(folder, kd)
    assert seen == [True] * 4


def test_true_labels_of_unlabelled_films_change_no_pseudo_label(tmp_path):
    run = opened(tmp_path / "r", train=(6, 20), **PSEUDO)
    teacher, films = run.network(), without_label(run)
    hidden = [replace(film, labels=(1, 1)) for film in films]
    blind, told = (pseudo_label.pseudo_labels(run, teacher, given) for given in (films, hidden))
    torch.testing.assert_close(blind, told, equal_nan=True)
    run.teller.close()


def test_student_learns_pseudo_labels_alone_and_of_unlabelled_films_alone(tmp_path):
    folder, fed = make_round(tmp_path / "r", train=(6, 16), validation=0, kappa=0.3, **PSEUDO), {}
    feed = Run.feed

    def watched(run, films, name, *rest):
        fed[name] = (films, rest[2] if len(rest) > 2 else None)
        return feed(run, films, name, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "feed", watched)
        phases_of(folder, pseudo_label)
    films, labels = fed["pseudo"]
    made = read_file(folder / "checkpoint/pseudo-labels.safetensors")[0]["labels"]
    assert not any(film.labelled for film in films)
    assert len(made) == 16 > len(labels)
    torch.testing.assert_close(labels, made[(~made.isnan()).any(1)], equal_nan=True)
    assert all(film.labelled for film in fed["t0"][0] + fed["finetune"][0])


@pytest.mark.parametrize("flip", [False, True])
def test_answers_are_the_mean_over_crops_that_are_mirrored_only_where_films_are(tmp_path, flip):
    run = opened(tmp_path / "r", flip=flip, **{**PSEUDO, "arch": "vit_tiny_patch8_depth1"})
    teacher, films = run.network().eval(), without_label(run)
    images = normalise(to_image(read_plates(films), resize_matrix(512, 32)), run.recipe)
    side = 24  # 7/8 of 32 in whole patches of 8
    boxes = [(0, 0), (0, 8), (8, 0), (8, 8), (4, 4)]
    views = [image[..., y : y + side, x : x + side] for image in (images, images.flip(-1)) for y, x in boxes]
    with torch.no_grad():
        each = [teacher.classify(view).sigmoid() for view in (views if flip else views[:5])]
    mine = pseudo_label.answers(run, teacher, films, pseudo_label.crop_side(teacher, 32))
    torch.testing.assert_close(mine, torch.stack(each).mean(0))
    run.teller.close()


def test_best_epoch_is_kept_and_the_first_of_equals(tmp_path):
    run = opened(tmp_path / "r", **PSEUDO)
    state = run.state("t0", run.schedule(run.labelled("t0"), 1, 1e-3))
    for epoch, value in enumerate([0.6, 0.8, 0.8, 0.7]):
        torch.nn.init.constant_(state.student.cls_head.mlp[-1].bias, epoch)
        pseudo_label.keep_best(run, state, value)
    assert state.extra["auc"].item() == 0.8
    assert state.extra["best.cls_head.mlp.4.bias"].tolist() == [1.0, 1.0]
    run.teller.close()


def test_macro_auc_is_the_mean_over_findings_with_both_classes():
    scores = np.array([[0.1, 0.9, 0.5], [0.9, 0.1, 0.6], [0.5, 0.5, 0.7]])
    labels = np.array([[0, 1, 1], [1, 0, 1], [np.nan, 1, 1]], float)
    assert pseudo_label.macro_auc(scores, labels) == 1.0
    assert pseudo_label.macro_auc(scores[:, ::-1], 1 - labels[:, ::-1]) == 0.0
    assert pseudo_label.macro_auc(scores[:, 2:], labels[:, 2:]) is None


def kd_step(run, feeds, teacher=None, **recipe):
    """One step of a student beside its own copy as teacher; the losses, and the student after it."""
    run.recipe = replace(run.recipe, drop_path=0.0, **recipe)
    state = run.state("kd", run.schedule(feeds[0], 2, 1e-3))
    run.from_weights(None)(state)
    state.step = 1  # at step 0 the learning rate is 0
    teacher = (teacher or state.teacher).eval()
    return kd.be_taught(state, teacher, feeds), state


def test_films_without_a_label_bring_answers_only(tmp_path):
    run = opened(tmp_path / "r", **KD)
    teacher = run.network()
    torch.nn.init.constant_(teacher.cls_head.mlp[-1].bias, 2.0)
    labelled, rest = run.labelled("t0"), run.feed(without_label(run), "unlabelled", 0, False)
    both, _ = kd_step(run, [labelled, rest], teacher)
    alone, _ = kd_step(run, [labelled], teacher)
    none, _ = kd_step(run, [rest], teacher)
    assert both["classes"] == pytest.approx(alone["classes"], rel=1e-6)
    assert none["classes"] == 0
    sizes = [feed.batch(0, 1).size for feed in (labelled, rest)]
    mean = (alone["taught"] * sizes[0] + none["taught"] * sizes[1]) / sum(sizes)
    assert both["taught"] == pytest.approx(mean, rel=1e-5)
    assert alone["loss"] == pytest.approx(0.5 * alone["classes"] + 0.5 * alone["taught"], rel=1e-6)
    run.teller.close()


def test_step_in_parts_costs_what_the_whole_costs(tmp_path):
    run = opened(tmp_path / "r", **KD)
    teacher = run.network()
    torch.nn.init.constant_(teacher.cls_head.mlp[-1].bias, 2.0)
    feeds = [run.labelled("t0"), run.feed(without_label(run), "unlabelled", 0, False)]
    whole, one = kd_step(run, feeds, teacher)
    parts, other = kd_step(run, feeds, teacher, micro_batch=1)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    # gradients, not weights: Adam's first step makes a full step of a gradient that is zero but for rounding
    for mine, theirs in zip(one.student.parameters(), other.student.parameters(), strict=True):
        if mine.grad is not None and theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    run.teller.close()


def test_loss_is_the_bernoulli_form_on_the_same_view(tmp_path):
    run = opened(tmp_path / "r", **KD)
    teacher = run.network().eval()
    torch.nn.init.constant_(teacher.cls_head.mlp[-1].bias, 2.0)
    feed = run.labelled("t0")
    state = run.state("kd", run.schedule(feed, 2, 1e-3))
    state.student.eval()
    batch: Batch = feed.batch(0, 0)
    everything = slice(0, batch.size)
    terms = kd.teaching(teacher, 1.0)(state, batch, everything)
    view = batch.views(everything)[1]
    guess, told = state.student.classify(view), teacher.classify(view)
    expected = 0.5 * label_loss(guess, batch.labels) + 0.5 * bernoulli_kl(guess, told, 2.0)
    torch.testing.assert_close(terms.loss, expected)
    assert expected - 0.5 * label_loss(guess, batch.labels) > 0.1
    run.teller.close()


def test_without_the_teachers_share_a_step_is_one_on_labels(tmp_path):
    run = opened(tmp_path / "r", **KD)
    feed = run.labelled("t0")
    _, taught = kd_step(run, [feed], kd_alpha=0.0)
    alone = run.state("kd", run.schedule(feed, 2, 1e-3))
    run.from_weights(None)(alone)
    alone.step = 1
    supervise(alone, feed)
    for mine, theirs in zip(taught.student.parameters(), alone.student.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-5)
    run.teller.close()


def test_defective_teacher_has_a_quarter_of_the_epochs_at_their_own_rates(tmp_path):
    run = opened(tmp_path / "r", **KD)
    whole = run.schedule(run.labelled("t0"), 8, 1e-3)
    short = kd.defective(whole)
    assert short.steps == whole.steps // 4
    np.testing.assert_array_equal(short.lr, whole.lr[: short.steps])
    assert kd.defective(run.schedule(run.labelled("t0"), 3, 1e-3)).steps == whole.steps_per_epoch
    run.teller.close()


def in_train_mode(network, mode=True):
    return network.train()


def prevalence_of_the_scored(run, teacher, films):
    scores = pseudo_label.answers(run, teacher, films)
    labels = label_table(films)
    return targets.kappa_labels(scores, labels, run.recipe.kappa)


def always_ten(images, size):
    views = targets.ten_crop(images, size)
    return torch.cat([views[5:], views[:5]])


def latest(run, state, value):
    state.extra = {"auc": torch.tensor(value)} | {f"best.{k}": v.clone() for k, v in state.student.state_dict().items()}


def unshared(teacher, share):
    return TEACHING(teacher, 1.0)


TEACHING, DEFECTIVE = kd.teaching, kd.defective
MUTATIONS = [
    ("test_teacher_labels_in_eval_mode_and_keeps_its_statistics", "torch.nn.Module.eval", in_train_mode),
    ("test_teacher_of_kd_stands_still_in_eval_mode", "torch.nn.Module.eval", in_train_mode),
    (
        "test_true_labels_of_unlabelled_films_change_no_pseudo_label",
        "learner.recipes.pseudo_label.pseudo_labels",
        prevalence_of_the_scored,
    ),
    (
        "test_student_learns_pseudo_labels_alone_and_of_unlabelled_films_alone",
        "learner.recipes.pseudo_label.taught",
        lambda labels: list(range(len(labels))),
    ),
    ("test_answers_are_the_mean_over_crops_that_are_mirrored_only_where_films_are", "learner.recipes.pseudo_label.ten_crop", always_ten),
    ("test_best_epoch_is_kept_and_the_first_of_equals", "learner.recipes.pseudo_label.keep_best", latest),
    (
        "test_macro_auc_is_the_mean_over_findings_with_both_classes",
        "learner.recipes.pseudo_label.auc",
        lambda scores, labels: 0.5,
    ),
    ("test_films_without_a_label_bring_answers_only", "learner.recipes.kd.teaching", unshared),
    ("test_step_in_parts_costs_what_the_whole_costs", "learner.recipes.kd.share_of", lambda batch, part: 1.0),
    (
        "test_loss_is_the_bernoulli_form_on_the_same_view",
        "learner.recipes.kd.bernoulli_kl",
        lambda student, teacher, temperature: bernoulli_kl(student, teacher, 1.0),
    ),
    (
        "test_without_the_teachers_share_a_step_is_one_on_labels",
        "learner.recipes.kd.label_loss",
        lambda guess, labels, known: label_loss(guess, 1 - labels, known),
    ),
    ("test_defective_teacher_has_a_quarter_of_the_epochs_at_their_own_rates", "learner.recipes.kd.defective", lambda whole: whole),
]  # fmt: skip


@pytest.mark.parametrize(("test", "attribute", "wrong"), MUTATIONS)
def test_every_property_notices_its_mutation(monkeypatch, tmp_path, test, attribute, wrong):
    monkeypatch.setattr(attribute, wrong)
    given = {"tmp_path": tmp_path, "flip": False}
    wanted = inspect.signature(globals()[test]).parameters
    with pytest.raises(AssertionError):
        globals()[test](**{name: given[name] for name in wanted})
