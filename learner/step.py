"""One optimiser step over one or several sources of films, and the walk over steps: what every recipe shares.

An objective says what a part of a batch costs; here the parts are summed, the gradients clipped, the step taken and the
centres moved. Knows no loss by name, no file and no clock. When memory runs out, the parts get smaller and the result
stays the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from learner import collapse
from learner.heads import Network
from learner.monitors import measure
from learner.optim import Schedule, clip_each, drop_last_layer, set_rates
from learner.recipe import Recipe


class Stopped(RuntimeError):
    """The round can't go on; the text is its reason (non-finite, collapse, out of memory)."""


@dataclass
class Batch:
    """Films of one step: `views(part)` makes the views of a slice of them, so that a part fits into memory."""

    size: int
    views: Callable[[slice], list[Tensor]]
    labels: Tensor | None = None  # (B, F), nan = unknown; or soft targets
    index: Tensor | None = None  # (B,) position of each film in its feed's list


@dataclass
class Terms:
    """What one part of a batch brings: parts of a batch add up, so every mean is already weighted by its share."""

    loss: Tensor
    shown: dict[str, Tensor] = field(default_factory=dict)  # numbers for people, shares too
    rows: dict[str, Tensor] = field(default_factory=dict)  # teacher rows (n, K) that move the centre of this name
    seen: Tensor | None = None  # teacher's embeddings (n, D) of the originals, for the collapse monitors


@dataclass
class State:
    """Everything a step changes; a checkpoint holds all of it."""

    student: Network
    teacher: Network
    optimiser: torch.optim.Optimizer
    schedule: Schedule
    recipe: Recipe
    scaler: torch.amp.GradScaler
    centres: nn.ModuleDict = field(default_factory=nn.ModuleDict)  # each has `move(mean row)`
    extra: dict[str, Tensor] = field(default_factory=dict)  # what else a recipe carries along, by name
    dtype: torch.dtype | None = None  # of autocast; None = off
    phase: str = "distil"
    step: int = 0
    burst: int | None = None  # next labelled batch of a correction under way after `step`
    bursts: int = 0  # corrections begun: picks the views of the next one
    micro: int = 0  # films in one pass; 0 = all
    watch: dict[str, int] = field(default_factory=dict)  # for how many steps each monitor has been out of bounds
    notes: list[str] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        return self.step // self.schedule.steps_per_epoch


Losses = dict[str, float]
Objective = Callable[[State, Batch, slice], Terms]
Tick = Callable[[State], Losses]


def optimise(state: State, work: Sequence[tuple[Batch, Objective]], freeze_last: bool = False) -> Losses:
    """One optimiser step on the sum of all sources' objectives; then every centre moves by its rows' mean.

    Forward and backward over parts that fit, clip, step. Raises Stopped when a loss isn't finite: no weight has moved.
    """
    set_rates(state.optimiser, state.schedule, state.step)
    state.optimiser.zero_grad(set_to_none=True)
    losses: list[Tensor] = []
    shown: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {}
    seen: list[Tensor] = []
    for batch, objective in work:
        for part in parts(batch.size, state.micro):
            terms = objective(state, batch, part)
            state.scaler.scale(terms.loss).backward()
            losses.append(terms.loss.detach())
            for key, value in terms.shown.items():
                shown[key] = shown.get(key, 0.0) + value.detach()
            for key, value in terms.rows.items():
                rows.setdefault(key, []).append(value.detach())
            if terms.seen is not None:
                seen.append(terms.seen.detach())
    total = torch.stack(losses).sum()
    told = dict(
        zip(
            ["loss", *shown], torch.stack([total.double(), *(v.double() for v in shown.values())]).tolist(), strict=True
        )
    )
    if not np.isfinite(told["loss"]):
        raise Stopped(f"non-finite: the loss is {told['loss']} at {state.phase} step {state.step}")
    state.scaler.unscale_(state.optimiser)
    if state.recipe.clip:
        clip_each(state.student, state.recipe.clip)
    if freeze_last:
        drop_last_layer(state.student)
    state.scaler.step(state.optimiser)
    state.scaler.update()
    if seen:  # measured against the centre that the loss subtracted
        dino = cast(Any, state.centres["dino"])
        told |= measure(torch.cat(rows["dino"]), dino.centre, dino.teacher_temp, torch.cat(seen), told["dino"])
    for key, parts_of in rows.items():
        cast(Any, state.centres[key]).move(torch.cat(parts_of).mean(0, keepdim=True))
    return told


def watch(state: State, losses: Losses) -> None:
    """Count how long each collapse monitor has been out of bounds; raises Stopped when one has lost patience."""
    state.watch = collapse.count(state.watch, losses)
    if why := collapse.reason(state.watch, losses):
        raise Stopped(f"{why}, at {state.phase} step {state.step}")


def parts(size: int, micro: int) -> list[slice]:
    """Slices of at most `micro` films (0 = all at once)."""
    width = micro or size
    return [slice(low, min(low + width, size)) for low in range(0, size, width)]


def share_of(batch: Batch, part: slice) -> float:
    """The weight of a mean over this part in the mean over the batch."""
    return (part.stop - part.start) / batch.size


def full(x: Tensor) -> Tensor:
    """Losses are taken in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def walk(state: State, tick: Tick, after: Callable[[Losses], None]) -> None:
    """From where the state stands to the end of its phase; calls `after` when each optimiser step is complete.

    Whatever `after` raises leaves a state from which another `walk` goes on exactly.
    """
    while state.step < state.schedule.steps:
        after(_halving(state, tick))


def _halving(state: State, tick: Tick) -> Losses:
    """A tick; when memory runs out, the same tick again in halves, noted; raises Stopped at one film a pass."""
    while True:
        try:
            # stochastic depth draws from torch's generator: seeded by place, never saved
            torch.manual_seed(seed_of(state))
            return tick(state)
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


def seed_of(state: State) -> int:
    """A number that depends on the place in the round alone: seed, phase, step and batch of a correction."""
    phase = int.from_bytes(state.phase.encode()[:6])
    place = [state.recipe.seed, phase, state.step, 0 if state.burst is None else 1 + state.burst]
    return int(np.random.SeedSequence(place).generate_state(1)[0])
