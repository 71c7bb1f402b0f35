"""The DINO loss with its centre, and the one optimiser step that every phase of a round takes.

Knows views as tensors and a state in memory: no file, no clock, no film. The golden end-to-end test drives `distil`
of this file with the published inputs, and the round drives the same function.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor, nn

from learner.heads import Network
from learner.optim import Schedule, clip_each, drop_last_layer, move_average, set_rates
from learner.pseudo import label_loss, self_training_loss
from learner.recipe import Recipe

SPREAD_FLOOR = 1e-3  # relative spread of the teacher's CLS between films; a fresh random ViT shows > 1e-2
PATIENCE = 25  # steps in a row under the floor before a round is called collapsed


class Stopped(RuntimeError):
    """The round can't go on; the text is its reason (non-finite, collapse, out of memory)."""


@dataclass
class Batch:
    """Films of one step: `views(part)` makes the views of a slice of them, so that a part fits into memory."""

    size: int
    views: Callable[[slice], list[Tensor]]
    labels: Tensor | None = None  # (B, F), nan = unknown


class DinoLoss(nn.Module):
    """Cross-entropy of student views against centred, sharpened teacher views, over all pairs but the same view."""

    centre: Tensor

    def __init__(self, prototypes: int, student_temp: float, teacher_temp: float, momentum: float) -> None:
        super().__init__()
        self.student_temp, self.teacher_temp, self.momentum = student_temp, teacher_temp, momentum
        self.register_buffer("centre", torch.zeros(1, prototypes))

    def forward(self, student: Tensor, teacher: Tensor, teacher_temp: float | None = None) -> Tensor:
        """Student (V B, K) and teacher (2 B, K) logits, view-major -> scalar; the centre stays (see `move`)."""
        targets = ((teacher - self.centre) / (teacher_temp or self.teacher_temp)).softmax(-1).detach().chunk(2)
        films = targets[0].shape[0]
        guesses = (student / self.student_temp).log_softmax(-1).split(films)
        terms = [
            -(t * guess).sum(-1).mean() for i, t in enumerate(targets) for j, guess in enumerate(guesses) if i != j
        ]
        return torch.stack(terms).sum() / len(terms)

    @torch.no_grad()
    def move(self, mean_teacher: Tensor) -> None:
        """Centre <- momentum centre + (1 - momentum) mean teacher logits (1, K) of the whole batch."""
        self.centre.mul_(self.momentum).add_(mean_teacher, alpha=1 - self.momentum)


@dataclass
class State:
    """Everything a step changes; a checkpoint holds all of it."""

    student: Network
    teacher: Network
    dino: DinoLoss
    optimiser: torch.optim.Optimizer
    schedule: Schedule
    recipe: Recipe
    scaler: torch.amp.GradScaler
    dtype: torch.dtype | None = None  # of autocast; None = off
    phase: str = "distil"  # "t0" (labels only) or "distil"
    step: int = 0
    burst: int | None = None  # next labelled batch of a correction under way after `step`
    bursts: int = 0  # corrections begun: picks the views of the next one
    micro: int = 0  # films in one pass; 0 = all
    collapsed_for: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        return self.step // self.schedule.steps_per_epoch


Losses = dict[str, float]


def distil(state: State, batch: Batch) -> Losses:
    """One step on unlabelled films: self-supervision and self-training, then the teacher follows."""
    ramp = float(state.schedule.alpha[state.epoch])
    losses = optimise(state, batch, lam=state.recipe.lam, class_weight=(1 - state.recipe.lam) * ramp, labelled=False)
    move_average(state.teacher, state.student, float(state.schedule.momentum[state.step]))
    _watch(state, losses)
    return losses


def supervise(state: State, batch: Batch) -> Losses:
    """One step of T=0: labels only. The published code averages a teacher here too and discards it; this one doesn't."""
    return optimise(state, batch, lam=0.0, class_weight=1.0, labelled=True)


def optimise(state: State, batch: Batch, lam: float, class_weight: float, labelled: bool) -> Losses:
    """One optimiser step on lam L_dino + class_weight L_class. Forward and backward over the batch in parts that fit, clip, step, then move the centre once."""
    set_rates(state.optimiser, state.schedule, state.step)
    state.optimiser.zero_grad(set_to_none=True)
    micro = state.micro or batch.size
    known = None if batch.labels is None else (~batch.labels.isnan()).sum()
    teacher_rows: list[Tensor] = []
    totals = torch.zeros(4, dtype=torch.float64)
    for low in range(0, batch.size, micro):
        part = slice(low, min(low + micro, batch.size))
        share = (part.stop - part.start) / batch.size
        dino, classes, rows, spread = _losses(state, batch, part, lam, known if labelled else None)
        # a label loss is already a share of the batch's known labels; the other two are means of this part
        loss = lam * dino * share + class_weight * classes * (1.0 if labelled else share)
        if not isfinite(loss.item()):
            raise Stopped(f"non-finite: the loss is {loss.item()} at {state.phase} step {state.step}")
        state.scaler.scale(loss).backward()
        shares = (1.0, share, 1.0 if labelled else share, share)
        totals += torch.tensor(
            [v.item() * s for v, s in zip((loss, dino, classes, spread), shares, strict=True)], dtype=totals.dtype
        )
        teacher_rows += [] if rows is None else [rows]
    state.scaler.unscale_(state.optimiser)
    if state.recipe.clip:
        clip_each(state.student, state.recipe.clip)
    if state.phase == "distil" and state.epoch < state.recipe.freeze_last:
        drop_last_layer(state.student)
    state.scaler.step(state.optimiser)
    state.scaler.update()
    if teacher_rows:
        state.dino.move(torch.cat(teacher_rows).mean(0, keepdim=True))
    return dict(zip(("loss", "dino", "classes", "spread"), totals.tolist(), strict=True))


def _losses(
    state: State, batch: Batch, part: slice, lam: float, known: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """L_dino, the class loss, the teacher's prototype rows and its spread between films, for one part of a batch."""
    views = batch.views(part)
    zero = views[0].new_zeros(())
    films = views[0].shape[0]
    with torch.autocast(views[0].device.type, dtype=state.dtype, enabled=state.dtype is not None):
        if lam == 0.0 and known is not None:
            logits = _full(state.student.classify(views[1]))
            assert batch.labels is not None
            return zero, label_loss(logits, batch.labels[part], known), None, zero
        with torch.no_grad():
            seen = state.teacher.encode(views[:2])
            teacher_head, teacher_class = _full(state.teacher.head(seen)), _full(state.teacher.cls_head(seen[:films]))
        student_head, student_class = state.student(views)
    student_head, student_class = _full(student_head), _full(student_class)[films:]  # class logits of the noised view
    dino = state.dino(student_head, teacher_head)
    if known is not None:
        assert batch.labels is not None
        classes = label_loss(student_class, batch.labels[part], known)
    else:
        classes = self_training_loss(student_class, teacher_class, state.recipe.poison_teacher)
    return dino, classes, teacher_head, relative_spread(seen[:films])


def _full(x: Tensor) -> Tensor:
    """Losses are taken in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def relative_spread(cls: Tensor) -> Tensor:
    """How much CLS (B, D) differs between films, over its length: 0 = all films look the same; nan for one film."""
    cls = _full(cls)
    if len(cls) < 2:
        return cls.new_full((), float("nan"))
    return (cls - cls.mean(0)).norm(dim=1).mean() / cls.norm(dim=1).mean().clamp(min=1e-12)


def _watch(state: State, losses: Losses) -> None:
    state.collapsed_for = state.collapsed_for + 1 if losses["spread"] < SPREAD_FLOOR else 0
    if state.collapsed_for >= PATIENCE:
        raise Stopped(
            f"collapse: the teacher's embedding differs by less than {SPREAD_FLOOR} between films "
            f"for {PATIENCE} steps, at step {state.step}"
        )
