"""One optimiser step over one or several batches, and the loop over the steps of a phase; shared by all recipes.

An objective returns the loss of a part of a batch. A step adds up the parts, clips the gradients, steps the optimiser and
moves the centres. When memory runs out, the parts get smaller and the result stays the same.
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
    """A part of a step did not fit into memory on some rank; raised on all ranks."""


@dataclass
class Batch:
    """This rank's samples of one step; `views(part)` makes the views of a slice of them, so that a part fits into memory.

    Each view is (b, 1, s, s), or tokens (b, n, D). A mean is always over the samples of all ranks; a rank may have none.
    """

    size: int
    views: Callable[[slice], list[Tensor]]
    labels: Tensor | None = None  # (B, F), nan = unknown; or soft targets
    index: Tensor | None = None  # (B,) position of each sample in its feed
    whole: int = 0  # samples of all ranks; 0 = `size`
    known: Tensor | None = None  # number of known labels of all ranks' samples; None = counted here

    def __post_init__(self) -> None:
        self.whole = self.whole or self.size
        if self.known is None and self.labels is not None:
            self.known = (~self.labels.isnan()).sum()


@dataclass
class Terms:
    """The result of an objective on one part of a batch; every mean is weighted so that the parts add up."""

    loss: Tensor
    logged: dict[str, Tensor] = field(default_factory=dict)  # losses for metrics.jsonl, by name
    centre_rows: dict[str, Tensor] = field(default_factory=dict)  # teacher rows (n, K) for the centre of this name
    embeddings: Tensor | None = None  # teacher's embeddings (n, D) of unaugmented views, for the collapse monitors


@dataclass
class State:
    """Everything that a step changes; a checkpoint holds all of it."""

    student: Network
    teacher: Network
    optimiser: torch.optim.Optimizer
    schedule: Schedule
    recipe: Recipe
    scaler: torch.amp.GradScaler
    centres: nn.ModuleDict = field(default_factory=nn.ModuleDict)  # each has `move(mean row)`
    extra: dict[str, Tensor] = field(default_factory=dict)  # further tensors of a recipe, by name
    dtype: torch.dtype | None = None  # of autocast; None = off
    phase: str = "distil"
    step: int = 0
    burst: int | None = None  # next labelled batch of the correction after `step`; None outside of a correction
    bursts: int = 0  # corrections started so far; selects the views of the next one
    micro: int = 0  # samples in one forward pass; 0 = all
    watch: dict[str, int] = field(default_factory=dict)  # steps in a row that each monitor has been outside its limits
    notes: list[str] = field(default_factory=list)  # for the card

    @property
    def epoch(self) -> int:
        """Epoch of the current step, from 0."""
        return self.step // self.schedule.steps_per_epoch


ONE_VALUE_MESSAGE = (
    "more than 1 value per channel"  # in the ValueError of torch's batch norm, which has no type of its own
)
EMBEDDINGS = "embeddings"  # key of `Terms.embeddings` among the centre rows
Losses = dict[str, float]
Objective = Callable[[State, Batch, slice], Terms]
StepFunction = Callable[[State], Losses]


def optimiser_step(state: State, work: Sequence[tuple[Batch, Objective]], freeze_last: bool = False) -> Losses:
    """Make one optimiser step on the sum of all objectives, then move each centre by the mean of its rows.

    Forward and backward over parts that fit into memory, sum over ranks, clip, step. Returns the losses and monitors.
    Raises LearnerError, with unchanged weights, for a loss that is not finite; OutOfMemory where a part did not fit.
    """
    set_rates(state.optimiser, state.schedule, state.step)
    state.optimiser.zero_grad(set_to_none=True)
    try:
        losses, rows = _accumulate(state, work)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        losses, rows = None, {}
    losses, rows = _sum_over_ranks(state, losses, rows)
    if not np.isfinite(losses["loss"]):
        raise LearnerError(f"non-finite: the loss is {losses['loss']} at {state.phase} step {state.step}")
    state.scaler.unscale_(state.optimiser)
    if state.recipe.clip:
        clip_each(state.student, state.recipe.clip)
    if freeze_last:
        drop_prototype_gradient(state.student)
    state.scaler.step(state.optimiser)
    state.scaler.update()
    embeddings = rows.pop(EMBEDDINGS, None)
    if embeddings is not None and "dino" in rows:  # before the centre moves: the loss has used the old one
        dino = cast(Any, state.centres["dino"])
        losses |= measure(rows["dino"], dino.centre, dino.teacher_temp, embeddings, losses["dino"])
    elif embeddings is not None:
        losses |= measure_embeddings(embeddings)
    for key, teacher_rows in rows.items():
        mean = distributed.mean_over_ranks(teacher_rows).to(teacher_rows.dtype)
        cast(Any, state.centres[key]).move(mean[None])
    return losses


def _accumulate(state: State, work: Sequence[tuple[Batch, Objective]]) -> tuple[Losses, dict[str, Tensor]]:
    """Add up the gradients of this rank's samples; return the losses and the teacher rows, both empty without samples."""
    totals: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {}
    for batch, objective in work:
        for part in parts(batch.size, state.micro):
            terms = objective(state, batch, part)
            state.scaler.scale(terms.loss).backward()
            for key, value in {"loss": terms.loss, **terms.logged}.items():
                totals[key] = totals.get(key, 0.0) + value.detach().double()
            embeddings = {} if terms.embeddings is None else {EMBEDDINGS: terms.embeddings}
            for key, value in {**terms.centre_rows, **embeddings}.items():
                rows.setdefault(key, []).append(value.detach())
    numbers = torch.stack([*totals.values()]).tolist() if totals else []  # one wait for the device
    return dict(zip(totals, numbers, strict=True)), {key: torch.cat(some) for key, some in rows.items()}


def _sum_over_ranks(state: State, losses: Losses | None, rows: dict[str, Tensor]) -> tuple[Losses, dict[str, Tensor]]:
    """Sum gradients and losses over the ranks; return the losses and this rank's rows, none where only others have some.

    Leaves out rows that no rank has, such as patches in a step that masks none; their centre then does not move. `losses`
    is None where memory ran out: then raises OutOfMemory on every rank, before any sum.
    """
    parameters = [*state.student.parameters()]
    has_gradient = [parameter.grad is not None for parameter in parameters]
    shapes = {key: some.shape[1:] for key, some in rows.items() if len(some)}
    ranks = distributed.gather_values((losses, has_gradient, shapes))
    all_losses = [rank_losses for rank_losses, _, _ in ranks if rank_losses is not None]
    if len(all_losses) < len(ranks):
        raise OutOfMemory(f"on {len(ranks) - len(all_losses)} of {len(ranks)} ranks")
    used = [parameter for i, parameter in enumerate(parameters) if any(has[i] for _, has, _ in ranks)]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    distributed.sum_over_ranks([cast(Tensor, parameter.grad) for parameter in used])
    shapes = {key: shape for _, _, rank_shapes in ranks for key, shape in rank_shapes.items()}
    rows = {key: rows.get(key, torch.empty(0, *shape, device=parameters[0].device)) for key, shape in shapes.items()}
    names = dict.fromkeys(name for rank_losses in all_losses for name in rank_losses)
    return {name: sum(rank_losses.get(name, 0.0) for rank_losses in all_losses) for name in names}, rows


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a device or of the machine ran out; for the machine torch has only a message."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def require_finite(what: str, tensors: Iterable[Tensor]) -> None:
    """Raise LearnerError for a nan or an infinity; after the last step of a phase no further loss would show it."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise LearnerError(f"non-finite: {what} contain nan or infinity; try a lower learning rate")


def check_collapse(state: State, losses: Losses) -> None:
    """Count the steps that each monitor has been outside its limits; raise LearnerError when training has collapsed."""
    state.watch = collapse_limits.count_steps_outside(state.watch, losses)
    if reason := collapse_limits.collapse_reason(state.watch, losses):
        raise LearnerError(f"{reason}, at {state.phase} step {state.step}")


def parts(size: int, micro: int) -> list[slice]:
    """Return slices of at most `micro` samples (0 = all at once)."""
    width = micro or max(size, 1)
    return [slice(low, min(low + width, size)) for low in range(0, size, width)]


def share_of(batch: Batch, part: slice) -> float:
    """Return the weight of a mean over this part in the mean over the samples of all ranks."""
    return (part.stop - part.start) / batch.whole


def in_float32(x: Tensor) -> Tensor:
    """Return half-precision tensors as float32; losses need at least that."""
    return x if x.dtype == torch.float64 else x.float()


def run_steps(state: State, step: StepFunction, after: Callable[[Losses], None]) -> None:
    """Run the steps that are left of the phase; call `after` after each optimiser step.

    When `after` raises, the state is complete: another `run_steps` continues with the next step.
    """
    while state.step < state.schedule.steps:
        after(_step_in_smaller_parts(state, step))


def _step_in_smaller_parts(state: State, step: StepFunction) -> Losses:
    """Run one step; when memory runs out, halve the parts, note it and repeat. Raises LearnerError at one image a part."""
    while True:
        try:
            # stochastic depth draws from torch's generator: seed it for this step instead of saving its state
            torch.manual_seed(step_seed(state))
            return step(state)
        except ValueError as error:
            if ONE_VALUE_MESSAGE not in str(error):
                raise
            raise LearnerError(
                f"batch norm: a forward pass over one image leaves one value per channel ({error}); use a larger "
                "image_size, a batch of two or more, or more images in range train"
            ) from None
        except OutOfMemory:
            pass  # raised on all ranks: all of them repeat the step
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or distributed.world_size() > 1:
                raise  # the other ranks have not seen it: crash, and all resume from the checkpoint
        _halve_parts(state)


def _halve_parts(state: State) -> None:
    """Halve the number of samples in a forward pass, with a note. Raises LearnerError where it is one already."""
    size = state.micro or -(-state.recipe.batch // distributed.world_size())
    if size == 1:
        raise LearnerError("out of memory: a single image does not fit; use a smaller image_size or a smaller arch")
    state.micro = max(1, size // 2)
    state.optimiser.zero_grad(set_to_none=True)
    state.notes.append(
        f"out of memory: {state.micro} images in a forward pass instead of {size}; same batch, same result"
    )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def step_seed(state: State) -> int:
    """Return a seed from the recipe's seed, phase, step, correction batch and rank only."""
    phase = int.from_bytes(state.phase.encode()[:6])
    place = [state.recipe.seed, phase, state.step, 0 if state.burst is None else 1 + state.burst]
    return int(np.random.SeedSequence(place).generate_state(1 + distributed.rank())[-1])
