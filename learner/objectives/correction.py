"""DISTL's walk through a phase: unlabelled steps, and at intervals one more pass over all labelled images.

Knows when a correction is due and what one of its batches does; resumable between any two optimiser steps. Images and
files are the caller's.
"""

from typing import Protocol

from learner.engine.optim import ema_update
from learner.engine.step import Batch, Losses, State, check_collapse, optimiser_step
from learner.objectives.class_losses import Balance
from learner.objectives.dino import correction, self_distillation
from learner.round.recipe import Recipe


class Feed(Protocol):
    """Batches by number: `batches` a pass, and the i-th of a pass."""

    @property
    def batches(self) -> int: ...

    def batch(self, epoch: int, index: int) -> Batch: ...


def next_batch(feed: Feed, step: int) -> Batch:
    """The feed's batch at a step, pass after pass."""
    return feed.batch(*divmod(step, feed.batches))


def correction_due(recipe: Recipe, step: int) -> bool:
    """After every `correct_every`-th unlabelled step; step 0, whose learning rate is 0, counts as published or not."""
    return bool(recipe.correct_every) and step % recipe.correct_every == 0 and (step > 0 or recipe.correct_first)


def supervised_step(state: State, labelled: Feed, balance: Balance | None = None) -> Losses:
    """One step of T=0: labels only. The published code averages a teacher here too and discards it; this one doesn't."""
    losses = optimiser_step(state, [(next_batch(labelled, state.step), correction(0.0, 1.0, balance))])
    state.step += 1
    return losses


def distil_step(state: State, batch: Batch) -> Losses:
    """One step on unlabelled images: self-supervision and self-training, then the teacher follows."""
    recipe, ramp = state.recipe, float(state.schedule.alpha[state.epoch])
    objective = self_distillation(recipe.lam, (1 - recipe.lam) * ramp)
    losses = optimiser_step(state, [(batch, objective)], freeze_last=state.epoch < recipe.freeze_last)
    momentum = float(state.schedule.momentum[state.step])
    ema_update(state.teacher, state.student, momentum)
    check_collapse(state, losses)
    return losses | {"momentum": momentum}


def correction_step(state: State, batch: Batch) -> Losses:
    """One labelled batch of a burst: this step's rates; the centre moves, the teacher doesn't; no ramp."""
    recipe = state.recipe
    lam = recipe.lam if recipe.correct_loss == "mix" else 0.0
    return optimiser_step(state, [(batch, correction(lam, 1 - lam))], freeze_last=state.epoch < recipe.freeze_last)


def distl_step(state: State, unlabelled: Feed, labelled: Feed | None) -> Losses:
    """One optimiser step of DISTL, and the cursor moved past it."""
    if state.burst is None:
        losses = distil_step(state, next_batch(unlabelled, state.step))
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
