"""Steps of DISTL: self-distillation on unlabelled images, corrections on the labelled ones, and T=0.

A correction is one epoch over all labelled images, at intervals; the cursor in the state lets a round resume after any
optimiser step.
"""

from typing import Protocol

from learner.engine.optim import ema_update
from learner.engine.step import Batch, Losses, State, check_collapse, optimiser_step
from learner.objectives.class_losses import Balance
from learner.objectives.dino import correction, self_distillation
from learner.round.recipe import Recipe


class Feed(Protocol):
    """A source of batches: the number of batches in an epoch, and the i-th batch of an epoch."""

    @property
    def batches(self) -> int: ...

    def batch(self, epoch: int, index: int) -> Batch: ...


def next_batch(feed: Feed, step: int) -> Batch:
    """Return the feed's batch at a step, epoch after epoch."""
    return feed.batch(*divmod(step, feed.batches))


def correction_due(recipe: Recipe, step: int) -> bool:
    """Whether a correction follows this unlabelled step; after step 0 only with `correct_first`, as published."""
    return bool(recipe.correct_every) and step % recipe.correct_every == 0 and (step > 0 or recipe.correct_first)


def supervised_step(state: State, labelled: Feed, balance: Balance | None = None) -> Losses:
    """Make one step of T=0, with the label loss only; without the EMA teacher that the published code discards."""
    losses = optimiser_step(state, [(next_batch(labelled, state.step), correction(0.0, 1.0, balance))])
    state.step += 1
    return losses


def unlabelled_step(state: State, batch: Batch) -> Losses:
    """Make one step on unlabelled images with DINO and self-training losses, then update the EMA teacher."""
    recipe, ramp = state.recipe, float(state.schedule.alpha[state.epoch])
    objective = self_distillation(recipe.lam, (1 - recipe.lam) * ramp)
    losses = optimiser_step(state, [(batch, objective)], freeze_last=state.epoch < recipe.freeze_last)
    momentum = float(state.schedule.momentum[state.step])
    ema_update(state.teacher, state.student, momentum)
    check_collapse(state, losses)
    return losses | {"momentum": momentum}


def correction_step(state: State, batch: Batch) -> Losses:
    """Make one step on a labelled batch with the rates of the current step; moves the centre, not the teacher."""
    recipe = state.recipe
    lam = recipe.lam if recipe.correct_loss == "mix" else 0.0
    return optimiser_step(state, [(batch, correction(lam, 1 - lam))], freeze_last=state.epoch < recipe.freeze_last)


def distl_step(state: State, unlabelled: Feed, labelled: Feed | None) -> Losses:
    """Make one optimiser step of DISTL, unlabelled or correction, and move the cursor."""
    if state.burst is None:
        losses = unlabelled_step(state, next_batch(unlabelled, state.step))
        if labelled is not None and correction_due(state.recipe, state.step):
            state.burst = 0
        else:
            state.step += 1
    else:
        assert labelled is not None
        losses = correction_step(state, labelled.batch(state.bursts, state.burst))
        state.burst += 1
        if state.burst == labelled.batches:
            state.burst, state.bursts, state.step = None, state.bursts + 1, state.step + 1
    return losses
