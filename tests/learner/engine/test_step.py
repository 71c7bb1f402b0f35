"""Single steps: corrections, unknown labels, out of memory, losses that are not finite, collapse."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.engine.optim import ema_update
from learner.engine.step import Batch, Terms, optimiser_step, run_steps
from learner.errors import LearnerError
from learner.objectives.class_losses import label_loss, self_training_loss
from learner.objectives.distl_steps import correction_due, correction_step, distl_step, unlabelled_step
from learner.round.collapse_limits import PATIENCE
from learner.round.recipe import resolve
from tests.support.learner.round_folders import TINY
from tests.support.learner.tiny_states import (
    STEPS,
    Endless,
    centre,
    device_is_full,
    limit_memory,
    machine_is_full,
    make_batch,
    make_state,
    parameters,
)

torch.set_num_threads(1)  # tiny tensors: a second thread only slows them down


def distilled(state, batch, after=lambda losses: None):
    """Run a whole phase on one batch."""
    run_steps(state, lambda state: distl_step(state, Endless(batch), None), after)


def test_unknown_labels_have_no_weight():
    logits = torch.randn(3, 2).double().requires_grad_()
    labels = torch.tensor([[1.0, float("nan")], [float("nan")] * 2, [0.0, 1.0]]).double()
    loss = label_loss(logits, labels)
    loss.backward()
    known = [(0, 0), (2, 0), (2, 1)]
    plain = [torch.nn.functional.softplus(-logits[i] if labels[i] else logits[i]).item() for i in known]
    assert loss.item() == pytest.approx(np.mean(plain))
    assert not logits.grad[labels.isnan()].any()
    assert label_loss(logits, labels * float("nan")).item() == 0


def test_a_step_without_rows_for_a_centre_does_not_move_it():
    """Happens where a small batch has no masked view."""
    state = make_state()
    before = centre(state).fill_(0.25).clone()

    def none_masked(state, batch, part):
        views = batch.views(part)
        return Terms(
            state.student.classify(views[0]).sum(),
            centre_rows={"dino": views[0].new_empty(0, TINY["prototypes"])},
        )

    optimiser_step(state, [(make_batch(), none_masked)])
    assert torch.equal(centre(state), before)


def test_a_labelled_step_in_two_parts_equals_a_whole_one():
    labels = torch.tensor([[1.0, float("nan")], [0.0, 1.0], [float("nan")] * 2, [1.0, 1.0]]).double()
    whole, parts = make_state(), make_state()
    parts.micro = 2
    mine, theirs = correction_step(whole, make_batch(labels=labels)), correction_step(parts, make_batch(labels=labels))
    torch.testing.assert_close(parameters(whole.student), parameters(parts.student), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(centre(whole), centre(parts))
    assert mine["loss"] == pytest.approx(theirs["loss"])


def test_correction_moves_the_centre_but_not_the_teacher():
    state = make_state()
    before, kept = parameters(state.teacher), centre(state).clone()
    correction_step(state, make_batch(labels=torch.ones(4, 2).double()))
    assert torch.equal(parameters(state.teacher), before)
    assert not torch.equal(centre(state), kept)


def test_correction_with_learning_rate_zero_changes_only_centre_and_adam():
    state = make_state()
    state.schedule.lr[:] = 0
    before = parameters(state.student)
    correction_step(state, make_batch(labels=torch.ones(4, 2).double()))
    assert torch.equal(parameters(state.student), before)
    assert centre(state).any()
    moments = [*state.optimiser.state.values()]
    assert moments
    assert all(moment["step"] == 1 for moment in moments)


def followed(state, work, freeze_last=False):
    losses = optimiser_step(state, work, freeze_last)
    ema_update(state.teacher, state.student, 0.5)
    return losses


def at_some_rate(optimiser, schedule, step):
    for group in optimiser.param_groups:
        group["lr"] = 1e-3


MUTATIONS = [
    (
        test_correction_moves_the_centre_but_not_the_teacher,
        "learner.objectives.distl_steps.optimiser_step",
        followed,
    ),
    (
        test_correction_moves_the_centre_but_not_the_teacher,
        "learner.objectives.dino.DinoLoss.move",
        lambda dino, mean: None,
    ),
    (
        test_correction_with_learning_rate_zero_changes_only_centre_and_adam,
        "learner.objectives.dino.DinoLoss.move",
        lambda dino, mean: None,
    ),
    (
        test_correction_with_learning_rate_zero_changes_only_centre_and_adam,
        "learner.engine.step.set_rates",
        at_some_rate,
    ),
    (
        test_correction_with_learning_rate_zero_changes_only_centre_and_adam,
        "torch.optim.AdamW.step",
        lambda optimiser: None,
    ),
]


@pytest.mark.parametrize(("test", "attribute", "wrong"), MUTATIONS)
def test_every_property_notices_its_mutation(monkeypatch, test, attribute, wrong):
    monkeypatch.setattr(attribute, wrong)
    with pytest.raises(AssertionError):
        test()


def test_correction_with_labels_only_does_not_move_the_centre():
    state = make_state(correct_loss="ce")
    correction_step(state, make_batch(labels=torch.ones(4, 2).double()))
    assert not centre(state).any()


def test_a_poisoned_teacher_inverts_the_gradient():
    teacher = torch.tensor([[3.0, -2.0]])
    student = torch.zeros(1, 2, requires_grad=True)
    self_training_loss(student, teacher).backward()
    honest = student.grad.clone()
    student.grad = None
    self_training_loss(student, teacher, poisoned=True).backward()
    torch.testing.assert_close(student.grad, -honest)


def test_ema_with_momentum_one_and_zero():
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    kept = parameters(first)
    ema_update(first, second, 1.0)
    assert torch.equal(parameters(first), kept)
    ema_update(first, second, 0.0)
    assert torch.equal(parameters(first), parameters(second))


def test_corrections_are_due_at_intervals():
    recipe = resolve("distl", "gpu")
    assert [s for s in range(1501) if correction_due(recipe, s)] == [0, 500, 1000, 1500]
    later = replace(recipe, correct_first=False)
    assert not correction_due(later, 0)
    assert correction_due(later, 500)
    assert not any(correction_due(replace(recipe, correct_every=0), s) for s in range(1501))


@pytest.mark.parametrize("full", [device_is_full, machine_is_full])
def test_out_of_memory_halves_the_parts_and_keeps_the_step(full):
    roomy, crowded = make_state(), make_state()
    limit_memory(crowded, 2, full)  # two views of one image
    for state in (roomy, crowded):
        state.schedule = replace(state.schedule, lr=state.schedule.lr[:3])
        distilled(state, make_batch())
    assert crowded.micro == 1
    assert crowded.notes == [
        "out of memory: 2 images in a forward pass instead of 4; same batch, same result",
        "out of memory: 1 images in a forward pass instead of 2; same batch, same result",
    ]
    torch.testing.assert_close(parameters(roomy.student), parameters(crowded.student), rtol=1e-7, atol=1e-8)


def test_out_of_memory_with_one_image_stops_the_round():
    state = make_state()
    limit_memory(state, 1)
    with pytest.raises(LearnerError, match="out of memory: a single image does not fit"):
        distilled(state, make_batch())


def test_other_errors_are_not_taken_for_out_of_memory():
    state = make_state()
    limit_memory(state, 1, lambda: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        distilled(state, make_batch())
    assert state.notes == []


def test_a_loss_that_is_not_finite_stops_before_weights_change():
    state = make_state()
    before = parameters(state.student)
    bad = Batch(4, lambda part: [torch.full((4, 1, s, s), float("inf")).double() for s in (16, 16, 8, 8)])
    with pytest.raises(LearnerError, match="non-finite: the loss is nan"):
        unlabelled_step(state, bad)
    assert torch.equal(parameters(state.student), before)


def test_a_network_with_equal_embeddings_is_called_collapsed():
    state = make_state()
    for network in (state.student, state.teacher):
        torch.nn.init.zeros_(network.backbone.vit.patch_embed.proj.weight)
    state.schedule.lr[:] = 0
    steps = []
    with pytest.raises(LearnerError, match="collapse"):
        distilled(state, make_batch(), steps.append)
    assert len(steps) == PATIENCE - 1


def test_a_single_image_is_not_called_collapsed():
    state = make_state()
    distilled(state, make_batch(samples=1))
    assert state.step == STEPS
