"""Knowledge distillation for findings that don't exclude one another: one Bernoulli answer per finding.

Knows logits and labels; nan means unknown in both (a finding the teacher never learnt, a label nobody gave). The
softmax over findings that Ho & Gwak (2020) print forces their probabilities to sum to 1 and is not used.
"""

from typing import Unpack

import torch.nn.functional as F
from torch import Tensor

from learner.objectives.class_losses import Balance, label_loss


def bernoulli_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 mean KL(teacher || student) of sigmoid(z / T), over (B, F) logits; a teacher's nan counts as 0.

    T^2 keeps the gradient's size: T (sigmoid(z_s / T) - sigmoid(z_t / T)) / (B F) towards (z_s - z_t) / 4 (B F).
    The mean is over all B F, so that a finding the teacher doesn't know leaves the weight of the others alone.
    """
    known = ~teacher.isnan()
    seen, guess = teacher.detach().nan_to_num(0.0) / temperature, student / temperature
    present = seen.sigmoid() * (F.logsigmoid(seen) - F.logsigmoid(guess))
    absent = (-seen).sigmoid() * (F.logsigmoid(-seen) - F.logsigmoid(-guess))
    return temperature**2 * ((present + absent) * known).mean()


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float = 0.5,
    temperature: float = 2.0,
    known_in_batch: Tensor | None = None,
    share: float = 1.0,
    **balance: Unpack[Balance],
) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - alpha) label loss + alpha `bernoulli_kl`, and the two by themselves; all (B, F).

    Of a part of a batch: `known_in_batch` counts the whole batch's known labels, `share` is the part's of the images.
    `balance`: weights of `label_loss`.
    """
    hard = label_loss(student, labels, known_in_batch, **balance)
    soft = bernoulli_kl(student, teacher, temperature) * share
    return (1 - alpha) * hard + alpha * soft, hard, soft
