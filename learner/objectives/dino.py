"""DISTL's two costs: self-distillation between views with self-training on top, and the labelled images.

Knows views as tensors and a state in memory: no file, no clock, no image. The golden end-to-end test drives these very
functions with the published inputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from learner.engine.step import Batch, Objective, State, Terms, in_float32, share_of
from learner.objectives.class_losses import Balance, label_loss, self_training_loss


class DinoLoss(nn.Module):
    """Cross-entropy of student views against centred, sharpened teacher views, over all pairs but the same view."""

    centre: Tensor

    def __init__(self, prototypes: int, student_temp: float, teacher_temp: float, momentum: float) -> None:
        super().__init__()
        self.student_temp, self.teacher_temp, self.momentum = student_temp, teacher_temp, momentum
        self.register_buffer("centre", torch.zeros(1, prototypes))

    def forward(
        self, student: Tensor, teacher: Tensor, teacher_temp: float | None = None, assigned: Tensor | None = None
    ) -> Tensor:
        """Student (V B, K) and teacher (2 B, K) logits, view-major -> scalar; the centre stays (see `move`).

        `assigned` (2 B, K): the teacher's answers balanced elsewhere (`selfsup.sinkhorn`) in place of centred ones.
        """
        if assigned is None:
            assigned = ((teacher - self.centre) / (teacher_temp or self.teacher_temp)).softmax(-1)
        targets = assigned.detach().chunk(2)
        samples = targets[0].shape[0]
        guesses = (student / self.student_temp).log_softmax(-1).split(samples)
        terms = [
            -(t * guess).sum(-1).mean() for i, t in enumerate(targets) for j, guess in enumerate(guesses) if i != j
        ]
        return torch.stack(terms).sum() / len(terms)

    @torch.no_grad()
    def move(self, mean_teacher: Tensor) -> None:
        """Centre <- momentum centre + (1 - momentum) mean teacher logits (1, K) of the whole batch."""
        self.centre.mul_(self.momentum).add_(mean_teacher, alpha=1 - self.momentum)


def self_distillation(lam: float, class_weight: float) -> Objective:
    """lam L_dino + class_weight L_self: the student's noised view against the teacher's soft answer on the original."""

    def objective(state: State, batch: Batch, part: slice) -> Terms:
        def soft(student: Tensor, teacher: Tensor) -> Tensor:
            return self_training_loss(student, teacher, state.recipe.poison_teacher) * share_of(batch, part)

        return _both(state, batch, part, lam, class_weight, soft, watched=True)

    return objective


def correction(lam: float, class_weight: float, balance: Balance | None = None) -> Objective:
    """lam L_dino + class_weight L_label on labelled images; with lam = 0 only the noised view is looked at."""

    def objective(state: State, batch: Batch, part: slice) -> Terms:
        assert batch.labels is not None
        labels, known = batch.labels[part], batch.known

        def hard(student: Tensor, _: Tensor) -> Tensor:
            return label_loss(
                student, labels, known, **(balance or {})
            )  # already a share: divided by the whole batch's known labels

        if lam:
            return _both(state, batch, part, lam, class_weight, hard)
        views = batch.views(part)
        with autocast(state, views[0]):
            logits = in_float32(state.student.classify(views[1]))
        classes = hard(logits, logits)
        return Terms(class_weight * classes, {"classes": classes})

    return objective


def _both(
    state: State,
    batch: Batch,
    part: slice,
    lam: float,
    class_weight: float,
    cost: Callable[[Tensor, Tensor], Tensor],
    watched: bool = False,
) -> Terms:
    views = batch.views(part)
    samples = views[0].shape[0]
    with autocast(state, views[0]):
        with torch.no_grad():
            seen = state.teacher.encode(views[:2])
            teacher_head, teacher_class = (
                in_float32(state.teacher.head(seen)),
                in_float32(state.teacher.cls_head(seen[:samples])),
            )
        student_head, student_class = state.student(views)
    classes = cost(in_float32(student_class)[samples:], teacher_class)  # class logits of the noised view
    dino = state.centres["dino"](in_float32(student_head), teacher_head) * share_of(batch, part)
    shown = {"dino": dino, "classes": classes}
    return Terms(
        lam * dino + class_weight * classes, shown, {"dino": teacher_head}, seen[:samples] if watched else None
    )


def autocast(state: State, like: Tensor) -> torch.autocast:
    """Half precision where the round runs in it."""
    return torch.autocast(like.device.type, dtype=state.dtype, enabled=state.dtype is not None)
