"""The correction: at intervals the student goes once more through all labelled films.

Knows when a burst is due and what one of its batches does; the walk over steps and bursts, resumable between any two
optimiser steps, is `walk`. Films and files are the caller's.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from learner.distill import Batch, Losses, State, Stopped, distil, optimise, supervise
from learner.recipe import Recipe


class Feed(Protocol):
    """Batches by number: `batches` a pass, and the i-th of a pass."""

    @property
    def batches(self) -> int: ...

    def batch(self, sweep: int, index: int) -> Batch: ...


def correction_due(recipe: Recipe, step: int) -> bool:
    """After every `correct_every`-th unlabelled step; step 0, whose learning rate is 0, counts as published or not."""
    return bool(recipe.correct_every) and step % recipe.correct_every == 0 and (step > 0 or recipe.correct_first)


def correct(state: State, batch: Batch) -> Losses:
    """One labelled batch of a burst: this step's rates; the centre moves, the teacher doesn't; no ramp."""
    lam = state.recipe.lam if state.recipe.correct_loss == "mix" else 0.0
    return optimise(state, batch, lam=lam, class_weight=1 - lam, labelled=True)


def walk(state: State, unlabelled: Feed | None, labelled: Feed | None, after: Callable[[Losses], None]) -> None:
    """From where the state stands to the end of its phase; calls `after` when each optimiser step is complete.

    Whatever `after` raises leaves a state from which another `walk` goes on exactly.
    """
    while state.step < state.schedule.steps:
        after(_halving(state, unlabelled, labelled))


def _tick(state: State, unlabelled: Feed | None, labelled: Feed | None) -> Losses:
    """One optimiser step, and the cursor moved past it."""
    epoch, index = divmod(state.step, state.schedule.steps_per_epoch)
    # stochastic depth draws from torch's generator: seeded by place, never saved
    place = [state.recipe.seed, int(state.phase == "t0"), state.step, 0 if state.burst is None else 1 + state.burst]
    torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
    if state.phase == "t0":
        assert labelled is not None
        losses = supervise(state, labelled.batch(epoch, index))
        state.step += 1
    elif state.burst is None:
        assert unlabelled is not None
        losses = distil(state, unlabelled.batch(epoch, index))
        if labelled is not None and correction_due(state.recipe, state.step):
            state.burst = 0
        else:
            state.step += 1
    else:
        assert labelled is not None
        losses = correct(state, labelled.batch(state.bursts, state.burst))
        state.burst += 1
        if state.burst == labelled.batches:
            state.burst, state.bursts, state.step = None, state.bursts + 1, state.step + 1
    return losses


def _halving(state: State, unlabelled: Feed | None, labelled: Feed | None) -> Losses:
    """A tick; when memory runs out, the same tick again in halves, noted; raises Stopped at one film a pass."""
    while True:
        try:
            return _tick(state, unlabelled, labelled)
        except torch.OutOfMemoryError:
            size = state.micro or state.recipe.batch
            if size == 1:
                raise Stopped(
                    "out of memory: one film a pass doesn't fit; use smaller images or a smaller arch"
                ) from None
            state.micro = max(1, size // 2)
            state.optimiser.zero_grad(set_to_none=True)
            state.notes.append(
                f"out of memory: {state.micro} films a pass instead of {size}, the same batch and result"
            )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
