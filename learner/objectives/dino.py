"""The DINO loss, and DISTL's objectives: self-distillation with self-training, and correction on labelled images.

tests/learner/objectives/test_golden_vectors.py compares them with numbers from the published code.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from learner.engine.step import Batch, Objective, State, Terms, in_float32, share_of
from learner.objectives.class_losses import Balance, label_loss, self_training_loss


class DinoLoss(nn.Module):
    """Cross-entropy of student views with centred, sharpened teacher views, over all pairs of different views.

    Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, Eqs. 3 and 4.
    """

    centre: Tensor

    def __init__(self, prototypes: int, student_temp: float, teacher_temp: float, momentum: float) -> None:
        super().__init__()
        self.student_temp, self.teacher_temp, self.momentum = student_temp, teacher_temp, momentum
        self.register_buffer("centre", torch.zeros(1, prototypes))

    def forward(
        self, student: Tensor, teacher: Tensor, teacher_temp: float | None = None, assigned: Tensor | None = None
    ) -> Tensor:
        """Return the loss of student (V B, K) and teacher (2 B, K) logits, view-major; does not move the centre.

        `assigned` (2 B, K): teacher probabilities of `self_supervised.sinkhorn`, in place of centred ones.
        """
        if assigned is None:
            assigned = ((teacher - self.centre) / (teacher_temp or self.teacher_temp)).softmax(-1)
        targets = assigned.detach().chunk(2)
        predictions = (student / self.student_temp).log_softmax(-1).split(targets[0].shape[0])
        terms = [
            -(target * prediction).sum(-1).mean()
            for i, target in enumerate(targets)
            for j, prediction in enumerate(predictions)
            if i != j
        ]
        return torch.stack(terms).sum() / len(terms)

    @torch.no_grad()
    def move(self, mean_teacher: Tensor) -> None:
        """Set the centre to m centre + (1 - m) mean teacher logits (1, K) of the whole batch (Caron et al. 2021, Eq. 4)."""
        self.centre.mul_(self.momentum).add_(mean_teacher, alpha=1 - self.momentum)


def self_distillation(lam: float, class_weight: float) -> Objective:
    """Return the objective lam L_dino + class_weight L_self-training, for unlabelled images."""

    def objective(state: State, batch: Batch, part: slice) -> Terms:
        def self_training(student: Tensor, teacher: Tensor) -> Tensor:
            return self_training_loss(student, teacher, state.recipe.poison_teacher) * share_of(batch, part)

        return _dino_and_class(state, batch, part, lam, class_weight, self_training, monitored=True)

    return objective


def correction(lam: float, class_weight: float, balance: Balance | None = None) -> Objective:
    """Return the objective lam L_dino + class_weight L_label, for labelled images; lam = 0 uses only the augmented view."""

    def objective(state: State, batch: Batch, part: slice) -> Terms:
        assert batch.labels is not None
        labels, known = batch.labels[part], batch.known

        def loss_of_labels(student: Tensor, _: Tensor) -> Tensor:
            # no share_of: the sum is divided by the known labels of the whole batch already
            return label_loss(student, labels, known, **(balance or {}))

        if lam:
            return _dino_and_class(state, batch, part, lam, class_weight, loss_of_labels)
        views = batch.views(part)
        with autocast(state, views[0]):
            logits = in_float32(state.student.classify(views[1]))
        classes = loss_of_labels(logits, logits)
        return Terms(class_weight * classes, {"classes": classes})

    return objective


def _dino_and_class(
    state: State,
    batch: Batch,
    part: slice,
    lam: float,
    class_weight: float,
    class_loss: Callable[[Tensor, Tensor], Tensor],
    monitored: bool = False,
) -> Terms:
    """Return lam L_dino + class_weight class_loss(student, teacher) of a part; class logits (b, F).

    `class_loss` takes the student's logits on the augmented view and the teacher's on the unaugmented one.
    """
    views = batch.views(part)
    size = views[0].shape[0]
    with autocast(state, views[0]):
        with torch.no_grad():
            embeddings = state.teacher.encode(views[:2])
            teacher_head = in_float32(state.teacher.head(embeddings))
            teacher_class = in_float32(state.teacher.cls_head(embeddings[:size]))
        student_head, student_class = state.student(views)
    classes = class_loss(in_float32(student_class)[size:], teacher_class)
    dino = state.centres["dino"](in_float32(student_head), teacher_head) * share_of(batch, part)
    return Terms(
        lam * dino + class_weight * classes,
        {"dino": dino, "classes": classes},
        {"dino": teacher_head},
        embeddings[:size] if monitored else None,
    )


def autocast(state: State, like: Tensor) -> torch.autocast:
    """Return autocast in the state's dtype on the device of `like`; off where the dtype is None."""
    return torch.autocast(like.device.type, dtype=state.dtype, enabled=state.dtype is not None)
