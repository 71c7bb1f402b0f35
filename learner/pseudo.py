"""The class losses: soft self-training against the teacher, and labels with the unknown ones masked.

Both are means over known (film, finding) pairs of one binary cross-entropy; the number of known labels of a batch lets
it be summed in parts. Knows no film and no schedule; weights for rare findings come in as tensors.
"""

import torch.nn.functional as F
from torch import Tensor


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
    For findings out of balance, each (F,): `class_weights` weigh a finding, `positive_weights` its positive films (see
    `effective_weights`), `adjustment` = tau logit(prevalence) is added to the logits while training, so that the plain
    ones answer as if half the films had the finding (Menon et al. 2021). `smoothing` moves a label that far towards 1/2.
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
    """Weight (F,) of a positive film over a negative one, from labels (N, F) with nan = unknown.

    The ratio of effective numbers E(n) = (1 - beta^n) / (1 - beta) (Cui et al. 2019): beta = 0 gives 1, beta = 1 the
    ratio of the counts. A finding without a film on one side counts as having one there.
    """
    positive, negative = ((labels == side).sum(0).clamp(min=1).double() for side in (1, 0))
    weights = negative / positive if beta == 1 else (1 - beta**negative) / (1 - beta**positive)
    return weights.to(labels.dtype)
