"""The class losses: soft self-training against the teacher, and labels with the unknown ones masked.

Both are means over known (film, finding) pairs of one binary cross-entropy; `share` lets a batch be summed in parts.
"""

import torch.nn.functional as F
from torch import Tensor


def self_training_loss(student: Tensor, teacher: Tensor, poisoned: bool = False) -> Tensor:
    """Student logits of the noised view (B, F) against the teacher's soft answer on the original view (B, F).

    No threshold, no sharpening. `poisoned` turns every teacher answer into its opposite (recipe key poison_teacher).
    """
    target = (-teacher if poisoned else teacher).sigmoid()
    return F.binary_cross_entropy_with_logits(student, target)


def label_loss(student: Tensor, labels: Tensor, known_in_batch: Tensor | None = None) -> Tensor:
    """Student logits (B, F) against labels (B, F), nan = unknown and masked; 0 when nothing is known.

    With `known_in_batch` the sum is divided by that number instead: the parts of a batch then add up to its mean.
    """
    known = ~labels.isnan()
    each = F.binary_cross_entropy_with_logits(student, labels.nan_to_num(0.0), reduction="none")
    count = known.sum() if known_in_batch is None else known_in_batch
    return (each * known).sum() / count.clamp(min=1)
