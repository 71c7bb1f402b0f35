"""One optimiser step over one or several sources of images, and the run_steps over steps: what every recipe shares.

An objective says what a part of a batch costs; here the parts are summed, the gradients clipped, the step taken and the
centres moved. Knows no loss by name, no file and no clock. When memory runs out, the parts get smaller and the result
stays the same.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from learner.engine import distributed
from learner.engine.collapse_monitors import measure, measure_embeddings
from learner.engine.optim import Schedule, clip_each, drop_prototype_gradient, set_rates
from learner.errors import LearnerError
from learner.networks.heads import Network
from learner.round import collapse_limits
from learner.round.recipe import Recipe


class OutOfMemory(torch.OutOfMemoryError):
    """A part of a step didn't fit on some rank, and every rank was told."""


@dataclass
class Batch:
    """This rank's images of one step: `views(part)` makes the views of a slice of them, so that a part fits into memory.

    Shares of a mean are taken of the whole batch, which all ranks have together; a rank may have no image of it.
    """

    size: int
    views: Callable[[slice], list[Tensor]]
    labels: Tensor | None = None  # (B, F), nan = unknown; or soft targets
    index: Tensor | None = None  # (B,) position of each image in its feed's list
    whole: int = 0  # images of all ranks; 0 = these are all
    known: Tensor | None = None  # known labels of all ranks' images; None = counted here

    def __post_init__(self) -> None:
        self.whole = self.whole or self.size
        if self.known is None and self.labels is not None:
            self.known = (~self.labels.isnan()).sum()


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
    micro: int = 0  # images in one pass; 0 = all
    watch: dict[str, int] = field(default_factory=dict)  # for how many steps each monitor has been out of bounds
    notes: list[str] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        return self.step // self.schedule.steps_per_epoch


ONE_VALUE = "more than 1 value per channel"  # torch's only word for it
SEEN = "the originals"  # the rows of `Terms.seen` among those of the centres
Losses = dict[str, float]
Objective = Callable[[State, Batch, slice], Terms]
StepFunction = Callable[[State], Losses]


def optimiser_step(state: State, work: Sequence[tuple[Batch, Objective]], freeze_last: bool = False) -> Losses:
    """One optimiser step on the sum of all sources' objectives; then every centre moves by its rows' mean.

    Forward and backward over parts that fit, sum over ranks, clip, step: every rank takes the same step. Raises LearnerError
    when a loss isn't finite: no weight has moved; OutOfMemory when some rank's part didn't fit.
    """
    set_rates(state.optimiser, state.schedule, state.step)
    state.optimiser.zero_grad(set_to_none=True)
    try:
        told, rows = _accumulate(state, work)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        told, rows = None, {}
    told, rows = _sum_over_ranks(state, told, rows)
    if not np.isfinite(told["loss"]):
        raise LearnerError(f"non-finite: the loss is {told['loss']} at {state.phase} step {state.step}")
    state.scaler.unscale_(state.optimiser)
    if state.recipe.clip:
        clip_each(state.student, state.recipe.clip)
    if freeze_last:
        drop_prototype_gradient(state.student)
    state.scaler.step(state.optimiser)
    state.scaler.update()
    seen = rows.pop(SEEN, None)
    if seen is not None and "dino" in rows:  # measured against the centre that the loss subtracted
        dino = cast(Any, state.centres["dino"])
        told |= measure(rows["dino"], dino.centre, dino.teacher_temp, seen, told["dino"])
    elif seen is not None:
        told |= measure_embeddings(seen)
    for key, some in rows.items():
        cast(Any, state.centres[key]).move(distributed.mean_over_ranks(some).to(some.dtype)[None])
    return told


def _accumulate(state: State, work: Sequence[tuple[Batch, Objective]]) -> tuple[Losses, dict[str, Tensor]]:
    """Gradients of this rank's images; the loss and what is shown beside it (nothing without an image), and their rows."""
    told: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {}
    for batch, objective in work:
        for part in parts(batch.size, state.micro):
            terms = objective(state, batch, part)
            state.scaler.scale(terms.loss).backward()
            for key, value in {"loss": terms.loss, **terms.shown}.items():
                told[key] = told.get(key, 0.0) + value.detach().double()
            for key, value in {**terms.rows, **({} if terms.seen is None else {SEEN: terms.seen})}.items():
                rows.setdefault(key, []).append(value.detach())
    numbers = torch.stack([*told.values()]).tolist() if told else []  # one wait for the device
    return dict(zip(told, numbers, strict=True)), {key: torch.cat(some) for key, some in rows.items()}


def _sum_over_ranks(state: State, told: Losses | None, rows: dict[str, Tensor]) -> tuple[Losses, dict[str, Tensor]]:
    """Gradients and numbers := their sums over the ranks; rows stay, none of a kind that only others have.

    A kind of which no rank has a row, such as patches in a step that masks none, is left out: its centre stays.
    `told` is None where memory ran out: then raises OutOfMemory on every rank, before anything is summed.
    """
    parameters = [*state.student.parameters()]
    has = [parameter.grad is not None for parameter in parameters]
    given = distributed.gather_values((told, has, {key: some.shape[1:] for key, some in rows.items() if len(some)}))
    losses = [theirs for theirs, _, _ in given if theirs is not None]
    if len(losses) < len(given):
        raise OutOfMemory(f"on {len(given) - len(losses)} of {len(given)} ranks")
    touched = [parameter for i, parameter in enumerate(parameters) if any(has[i] for _, has, _ in given)]
    for parameter in touched:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    distributed.sum_over_ranks([cast(Tensor, parameter.grad) for parameter in touched])
    shapes = {key: shape for _, _, theirs in given for key, shape in theirs.items()}
    rows = {key: rows.get(key, torch.empty(0, *shape, device=parameters[0].device)) for key, shape in shapes.items()}
    names = dict.fromkeys(name for theirs in losses for name in theirs)
    return {name: sum(theirs.get(name, 0.0) for theirs in losses) for name in names}, rows


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory ran out, or the machine's, of which torch tells in words alone."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def require_finite(what: str, tensors: Iterable[Tensor]) -> None:
    """Raises LearnerError for a nan or an infinity: the last step of a phase has no loss after it that would tell."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise LearnerError(f"non-finite: {what} aren't all numbers; a lower learning rate is the usual cure")


def check_collapse(state: State, losses: Losses) -> None:
    """Count how long each collapse monitor has been out of bounds; raises LearnerError when one has lost patience."""
    state.watch = collapse_limits.count_steps_outside(state.watch, losses)
    if why := collapse_limits.collapse_reason(state.watch, losses):
        raise LearnerError(f"{why}, at {state.phase} step {state.step}")


def parts(size: int, micro: int) -> list[slice]:
    """Slices of at most `micro` images (0 = all at once)."""
    width = micro or max(size, 1)
    return [slice(low, min(low + width, size)) for low in range(0, size, width)]


def share_of(batch: Batch, part: slice) -> float:
    """The weight of a mean over this part in the mean over the whole batch."""
    return (part.stop - part.start) / batch.whole


def in_float32(x: Tensor) -> Tensor:
    """Losses are taken in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def run_steps(state: State, tick: StepFunction, after: Callable[[Losses], None]) -> None:
    """From where the state stands to the end of its phase; calls `after` when each optimiser step is complete.

    Whatever `after` raises leaves a state from which another `run_steps` goes on exactly.
    """
    while state.step < state.schedule.steps:
        after(_step_in_smaller_parts(state, tick))


def _step_in_smaller_parts(state: State, tick: StepFunction) -> Losses:
    """A tick; when memory runs out, the same tick again in halves, noted; raises LearnerError at one image a pass."""
    while True:
        try:
            # stochastic depth draws from torch's generator: seeded by place, never saved
            torch.manual_seed(step_seed(state))
            return tick(state)
        except ValueError as error:
            if ONE_VALUE not in str(error):
                raise
            raise LearnerError(
                f"batch norm: a pass over one image leaves one value a channel ({error}), and no statistic; use a larger "
                "image_size, a batch of two or more, or more images in range train"
            ) from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or (distributed.world_size() > 1 and not isinstance(error, OutOfMemory)):
                raise  # the others don't know: a crash, and all go on from the checkpoint
            size = state.micro or -(-state.recipe.batch // distributed.world_size())
            if size == 1:
                raise LearnerError(
                    "out of memory: one image a pass doesn't fit; use smaller images or a smaller arch"
                ) from None
            state.micro = max(1, size // 2)
            state.optimiser.zero_grad(set_to_none=True)
            state.notes.append(
                f"out of memory: {state.micro} images a pass instead of {size}, the same batch and result"
            )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def step_seed(state: State) -> int:
    """A number that depends on the place in the round alone: seed, phase, step, batch of a correction, and rank."""
    phase = int.from_bytes(state.phase.encode()[:6])
    place = [state.recipe.seed, phase, state.step, 0 if state.burst is None else 1 + state.burst]
    return int(np.random.SeedSequence(place).generate_state(1 + distributed.rank())[-1])
