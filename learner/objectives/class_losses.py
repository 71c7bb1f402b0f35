"""The class losses: soft self-training against the teacher, and labels with the unknown ones masked.

Both are means over known (image, finding) pairs of one binary cross-entropy; the number of known labels of a batch lets
it be summed in parts. Knows no image and no schedule; weights for rare findings come in as tensors.
"""

from typing import TypedDict

import torch.nn.functional as F
from torch import Tensor


class Balance(TypedDict, total=False):
    """Weights (F,) by the names that `label_loss` has for them; empty = all labels alike."""

    class_weights: Tensor
    positive_weights: Tensor


def self_training_loss(student: Tensor, teacher: Tensor, poisoned: bool = False) -> Tensor:
    """Student logits of the noised view (B, F) against the teacher's soft answer on the original view (B, F).

    No threshold, no sharpening. `poisoned` turns every teacher answer into its opposite (recipe key poison_teacher).
    """
    target = (-teacher if poisoned else teacher).sigmoid()
    return F.binary_cross_entropy_with_logits(student, target)


def label_loss(
    student: Tensor,
    labels: Tensor,
    known_in_batch: Tensor | None = None,
    *,
    class_weights: Tensor | None = None,
    positive_weights: Tensor | None = None,
    adjustment: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Student logits (B, F) against labels (B, F), nan = unknown and masked; 0 when nothing is known.

    With `known_in_batch` the sum is divided by that number instead: the parts of a batch then add up to its mean.
    For findings out of balance, each (F,): `class_weights` weigh a finding, `positive_weights` its positive images (see
    `effective_weights`), `adjustment` = tau logit(prevalence) is added to the logits while training, so that the plain
    ones answer as if half the images had the finding (Menon et al. 2021). `smoothing` moves a label that far towards 1/2.
    """
    known = ~labels.isnan()
    target = labels.nan_to_num(0.0)
    if smoothing:
        target = target * (1 - smoothing) + smoothing / 2
    logits = student if adjustment is None else student + adjustment
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none", pos_weight=positive_weights)
    if class_weights is not None:
        each = each * class_weights
    count = known.sum() if known_in_batch is None else known_in_batch
    return (each * known).sum() / count.clamp(min=1)


def effective_weights(labels: Tensor, beta: float = 0.999) -> Tensor:
    """Weight (F,) of a positive image over a negative one, from labels (N, F) with nan = unknown.

    The ratio of effective numbers E(n) = (1 - beta^n) / (1 - beta) (Cui et al. 2019): beta = 0 gives 1, beta = 1 the
    ratio of the counts. A finding without an image on one side counts as having one there.
    """
    positive, negative = ((labels == side).sum(0).clamp(min=1).double() for side in (1, 0))
    weights = negative / positive if beta == 1 else (1 - beta**negative) / (1 - beta**positive)
    return weights.to(labels.dtype)


def class_balance(labels: Tensor) -> Balance:
    """`effective_weights` of the positives of labels (N, F), and findings weighed so that each keeps its own sum.

    A finding's known labels weigh 1 on average as without balance: a rare one isn't louder than the others, and a
    step isn't longer. A finding of one class, or that nobody has labelled, is as it was.
    """
    weights, positive, known = effective_weights(labels), (labels == 1).sum(0), (~labels.isnan()).sum(0)
    total = weights * positive + (known - positive)
    return {"positive_weights": weights, "class_weights": known.clamp(min=1) / total.clamp(min=1)}


def weight_table(labels: Tensor, balance: Balance) -> Tensor | None:
    """The weight (N, F) that `label_loss` gives each of these labels; None = all alike."""
    if "class_weights" not in balance or "positive_weights" not in balance:
        return None
    return balance["class_weights"] * balance["positive_weights"].expand_as(labels).where(labels == 1, 1.0)
