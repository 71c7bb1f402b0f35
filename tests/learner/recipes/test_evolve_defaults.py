"""`evolve` with its default keys: a first teacher from graph and labels, and steps on its probabilities only."""

import pytest
import torch

from learner.__main__ import main
from learner.data.plates import label_table
from learner.fits import head_refit
from learner.objectives import teacher_student as steps
from learner.recipes import evolve
from learner.round.manifest import load
from learner.training import head_fit
from learner.training.run import Run
from tests.learner.recipes.test_evolve import rows
from tests.support.learner.round_folders import card, make, result

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


@pytest.fixture
def run(tmp_path):
    run = Run(load(make(tmp_path / "r", samples={"validation": 24}, lam=0.0)))
    yield run
    run.progress.close()


def fitted(run, network):
    """Return the logits of graph and labels on the features of this network."""
    samples = run.manifest.unlabelled
    return head_refit.fit_graph_and_labels(run.embeddings(network, samples), label_table(samples), 3, 4)


def weight(network):
    return network.cls_head.mlp[-1].weight.detach().double()


def test_a_step_uses_only_the_unaugmented_and_one_augmented_view(run, monkeypatch):
    seen, look = [], steps.encode
    monkeypatch.setattr(steps, "encode", lambda net, views, *rest: seen.append(len(views)) or look(net, views, *rest))
    state = run.new_state("evolve", run.schedule(run.unlabelled_feed(), 1, 1e-3))
    run.from_backbone(state)
    losses = steps.teacher_student_step(state, run.unlabelled_feed(), None, evolve.pseudo_label_table(run, state))
    assert seen == [1, 1]
    assert {"pseudo", "cls_std"} <= losses.keys()
    assert not {"dino", "ibot", "koleo", "labels", "teacher_kl"} & losses.keys()


def test_no_local_views_are_made_where_a_step_uses_none(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        "learner.recipes.evolve.teacher_student_step",
        lambda _, feed, *__: made.append(feed.recipe.local_views) or 1 / 0,
    )
    for lam in (0.0, 1.0):
        with pytest.raises(ZeroDivisionError):
            main([str(make(tmp_path / f"{lam}", lam=lam))])
    assert made == [0, 2]


def test_the_first_teacher_is_the_model_before_with_a_refitted_head(run):
    state = run.new_state("evolve", run.schedule(run.unlabelled_feed(), 1, 1e-3))
    run.from_backbone(state)
    evolve.refit_first_teacher(run, state)
    torch.testing.assert_close(weight(state.teacher), fitted(run, state.teacher).weight, rtol=1e-5, atol=1e-7)
    for key, value in state.student.state_dict().items():
        assert torch.equal(value, state.teacher.state_dict()[key]), key


def test_a_trained_head_keeps_half_of_the_refitted_head(run):
    network = run.new_network()
    torch.nn.init.normal_(network.cls_head.mlp[-1].weight, generator=torch.Generator().manual_seed(1))
    own, near = head_fit.head_of(network), fitted(run, network)
    seen = run.embeddings(network, run.manifest.unlabelled)
    head_fit.refit(run, network, 0.5)
    torch.testing.assert_close(
        weight(network), head_refit.blend_heads(near, own, seen, 0.5).weight, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(("average", "kept"), [("trained", "teacher"), ("least", "refit")])
def test_without_differences_on_validation_the_first_candidate_is_chosen(run, average, kept):
    final = run.new_state("evolve", run.schedule(run.unlabelled_feed(), 1, 1e-3))
    run.from_backbone(final)
    run.recipe = run.recipe.override({"average": average, "refit": "none"})
    assert evolve.choose_candidate(run, final, final.teacher) == kept


def test_the_note_says_that_every_image_has_a_pseudo_label(tmp_path):
    folder = make(tmp_path / "r", lam=0.0)
    assert main([str(folder)]) == 0, result(folder)
    rates = [row["pseudo_rate"] for row in rows(folder) if row.get("kind") == "pseudo"]
    assert rates == [1.0]


def test_the_card_notes_that_a_head_of_three_layers_is_not_refitted(tmp_path):
    folder = make(tmp_path / "r", lam=0.0, class_hidden=16)
    assert main([str(folder)]) == 0, result(folder)
    assert [note.split(" needs")[0] for note in card(folder)["notes"]] == ['refit = "graph"']
    assert card(folder, "t0")["notes"] == []
