"""Class losses: self-training against the teacher's probabilities, and the label loss with unknown labels masked.

Both are binary cross-entropies, averaged over the known (image, finding) pairs; and weights for rare classes.
"""

from typing import TypedDict

import torch.nn.functional as F
from torch import Tensor


class Balance(TypedDict, total=False):
    """Weights (F,) as keyword arguments of `label_loss`; empty = equal weights."""

    class_weights: Tensor
    positive_weights: Tensor


def self_training_loss(student: Tensor, teacher: Tensor, poisoned: bool = False) -> Tensor:
    """Return the cross-entropy of student logits (B, F) on the augmented view with the teacher's probabilities.

    teacher: logits (B, F) on the unaugmented view; no threshold, no sharpening, as in DISTL's code. `poisoned` negates
    them (recipe key poison_teacher).
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
    """Return the mean cross-entropy of student logits (B, F) with labels (B, F), nan = unknown; 0 without known labels.

    `known_in_batch`: divide by this number of known labels, so that the parts of a batch add up to its mean. All (F,):
    `class_weights` of findings; `positive_weights` of positive labels (see `effective_weights`); `adjustment` = tau
    logit(prevalence), added to the logits in training (Menon et al., ICLR 2021). `smoothing`: label smoothing.
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
    """Return the weight (F,) of a positive label relative to a negative one, from labels (N, F), nan = unknown.

    The ratio of effective numbers E(n) = (1 - beta^n) / (1 - beta) (Cui et al., CVPR 2019): beta = 0 gives 1, beta
    = 1 the ratio of counts. A class without an image counts as one image.
    """
    positive, negative = ((labels == side).sum(0).clamp(min=1).double() for side in (1, 0))
    weights = negative / positive if beta == 1 else (1 - beta**negative) / (1 - beta**positive)
    return weights.to(labels.dtype)


def class_balance(labels: Tensor) -> Balance:
    """Return `effective_weights` of labels (N, F), with class weights that keep the sum of weights of each finding.

    So the known labels of a finding weigh 1 on average, as without balance: rare findings do not dominate, and steps do
    not get larger. Findings with one class, or without labels, keep equal weights.
    """
    weights, positive, known = effective_weights(labels), (labels == 1).sum(0), (~labels.isnan()).sum(0)
    total = weights * positive + (known - positive)
    return {"positive_weights": weights, "class_weights": known.clamp(min=1) / total.clamp(min=1)}


def weight_table(labels: Tensor, balance: Balance) -> Tensor | None:
    """Return the weight (N, F) of each label in `label_loss`; None = equal weights."""
    if "class_weights" not in balance or "positive_weights" not in balance:
        return None
    return balance["class_weights"] * balance["positive_weights"].expand_as(labels).where(labels == 1, 1.0)
