"""Knowledge distillation for findings that can occur together: one Bernoulli distribution for each finding.

nan is unknown in logits (a finding that the teacher was not trained on) and in labels. Ho & Gwak (IEEE Access 2020) print
a softmax over the findings, which forces their probabilities to sum to 1; it is not used here.
"""

from typing import Unpack

import torch.nn.functional as F
from torch import Tensor

from learner.objectives.class_losses import Balance, label_loss


def bernoulli_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 mean KL(teacher || student) of the probabilities sigmoid(z / T), logits z (B, F); 0 where teacher is nan.

    The factor T^2 keeps the gradient's size: T (sigmoid(z_s / T) - sigmoid(z_t / T)) / (B F), which tends to
    (z_s - z_t) / (4 B F) for large T (Hinton et al. 2015, section 2.1, for the softmax). The mean is over all B F entries,
    so an unknown finding does not change the weight of the others.
    """
    known = ~teacher.isnan()
    target, prediction = teacher.detach().nan_to_num(0.0) / temperature, student / temperature
    present = target.sigmoid() * (F.logsigmoid(target) - F.logsigmoid(prediction))
    absent = (-target).sigmoid() * (F.logsigmoid(-target) - F.logsigmoid(-prediction))
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
    """Return (1 - alpha) label loss + alpha `bernoulli_kl`, the label loss and the KL; logits and labels are (B, F).

    For a part of a batch: `known_in_batch` is the number of known labels of the whole batch, `share` the part's share of
    its images. `balance`: weights of `label_loss`.
    """
    label_term = label_loss(student, labels, known_in_batch, **balance)
    kl_term = bernoulli_kl(student, teacher, temperature) * share
    return (1 - alpha) * label_term + alpha * kl_term, label_term, kl_term
