"""Pseudo-labels from a teacher's scores: selection, weights, and alignment with the labelled prevalence.

Each finding is handled on its own; nan = unknown or not selected. The prevalence comes from labelled images only: no
function here uses a label of the image that it makes a target for.
"""

from math import exp

import torch
from torch import Tensor, nn

SHRINKAGE = 10.0  # labelled images with which a finding's own rate weighs as much as the rate over all findings
NARROWEST = 1e-6  # logits: least standard deviation, where all reference logits are equal


def shrunk_prevalence(labels: Tensor, strength: float = SHRINKAGE) -> Tensor:
    """Return the prevalence (F,) from labels (N, F), nan = unknown: the mean of a Beta posterior, inside (0, 1).

    The prior counts as `strength` images at the rate over all findings, itself shrunk towards 1/2 by one image.
    """
    known, positive = (~labels.isnan()).sum(0), labels.nan_to_num(0.0).sum(0)
    pooled = (positive.sum() + 0.5) / (known.sum() + 1)
    return (positive + strength * pooled) / (known + strength)


def kappa_filter(scores: Tensor, positive_ratio: float, kappa: float) -> Tensor:
    """Return pseudo-labels (N,) of one finding from scores (N,): 1 for the highest, 0 for the lowest, nan between.

    With pi = `positive_ratio`: 1 from the int(kappa pi N)-th largest score up, 0 up to the score at index
    int(kappa (1 - pi) N) of the ascending order, and 0 where both hold (Martins & Silva's code). Raises ValueError for a
    kappa outside (0, 1].
    """
    _check(kappa)
    count = len(scores)
    positives, negatives = int(kappa * positive_ratio * count), int(kappa * (1 - positive_ratio) * count)
    ordered = scores.sort().values
    high = ordered[count - positives] if positives else ordered.new_tensor(torch.inf)
    return hard_labels(scores, ordered[min(negatives, count - 1)], high)


def kappa_labels(scores: Tensor, labels: Tensor, kappa: float) -> Tensor:
    """Return `kappa_filter` of each finding, (N, F), from scores (N, F); ratios from the labels (M, F) of other images."""
    ratios = shrunk_prevalence(labels).tolist()
    return torch.stack([kappa_filter(column, ratio, kappa) for column, ratio in zip(scores.T, ratios, strict=True)], 1)


def class_thresholds(scores: Tensor, prevalence: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    """Return low and high threshold (F,) of each finding: the kappa (1 - pi) and (1 - kappa pi) quantiles of scores (N, F).

    Class-aware pseudo-labelling (Xie et al., NeurIPS 2023); nan scores are left out. `kappa_filter` is the same for a
    fixed set of images. Raises ValueError for a kappa outside (0, 1].
    """
    _check(kappa)
    pairs = list(zip(scores.T, prevalence, strict=True))
    low = torch.stack([column.nanquantile(kappa * (1 - ratio)) for column, ratio in pairs])
    high = torch.stack([column.nanquantile(1 - kappa * ratio) for column, ratio in pairs])
    return low, high


def hard_labels(scores: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return 1 where score >= high, 0 where score <= low (also where both hold), else nan; thresholds broadcast."""
    labels = torch.full_like(scores, torch.nan).masked_fill(scores >= high, 1.0)
    return labels.masked_fill(scores <= low, 0.0)


def align(logits: Tensor, mean_prob: Tensor, prevalence: Tensor) -> Tensor:
    """Return z - logit(mean_prob) + logit(prevalence) for logits z (B, F): distribution alignment, after ReMixMatch.

    `mean_prob` (F,): the teacher's running mean probability (`MeanPrediction`); prevalence (F,).
    """
    return logits + (prevalence.logit(NARROWEST) - mean_prob.logit(NARROWEST))


def move_mean(mean_prob: Tensor, batch_mean: Tensor, momentum: float = 0.999) -> Tensor:
    """Return momentum mean_prob + (1 - momentum) batch_mean, both (F,)."""
    return momentum * mean_prob + (1 - momentum) * batch_mean


class MeanPrediction(nn.Module):
    """The teacher's running mean probability (1, F), updated in each step; nan before the first."""

    mean: Tensor

    def __init__(self, findings: int, momentum: float = 0.99) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.full((1, findings), torch.nan))

    @torch.no_grad()
    def move(self, batch_mean: Tensor) -> None:
        """Update the mean with the mean (1, F) of a whole batch; the first batch sets it."""
        self.mean.copy_(torch.where(self.mean.isnan(), batch_mean, move_mean(self.mean, batch_mean, self.momentum)))


def soft_weights(logits: Tensor, reference: Tensor, cut: Tensor) -> Tensor:
    """Return weights in [0, 1] of logits (B, F): 1 above the mean distance from the threshold `cut` (F,), Gaussian below.

    After SoftMatch (Chen et al., ICLR 2023). Mean and standard deviation of the distance come from the `reference`
    logits (N, F), for each finding and each side of the threshold: common ones would be those of the many negatives, and
    rare positives would get no weight. A side without reference logits gets weight 0.
    """
    weights = torch.zeros_like(logits)
    for side in (1.0, -1.0):
        distance, known = side * (logits - cut), side * (reference - cut)
        on_side = known > 0  # False for nan
        count, known = on_side.sum(0), known.where(on_side, 0.0)
        mean = known.sum(0) / count.clamp(min=1)
        variance = ((known - mean) ** 2 * on_side).sum(0) / count.clamp(min=1)
        below = (distance - mean).clamp(max=0.0)
        bell = (-(below**2) / (2 * variance.clamp(min=NARROWEST**2))).exp() * (count > 0)
        weights = bell.where(distance > 0, weights)
    return weights


def agreement(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 - |sigmoid(a) - sigmoid(b)| of two heads' logits (B, F)."""
    return 1 - (a.sigmoid() - b.sigmoid()).abs()


def ramp_up(t: float) -> float:
    """Return exp(-5 (1 - t)^2), t limited to [0, 1]: .0067 at 0, 1 from 1 on (Laine & Aila, ICLR 2017)."""
    return exp(-5 * (1 - min(max(t, 0.0), 1.0)) ** 2)


def ten_crop(images: Tensor, size: int) -> Tensor:
    """Return ten crops (10, B, C, size, size) of images (B, C, H, W); the first five are not mirrored.

    Top left, top right, bottom left, bottom right and centre, then the same of the mirrored image. Raises ValueError for
    a crop larger than the image.
    """
    high, wide = images.shape[-2:]
    if size > min(high, wide):
        raise ValueError(f"a crop of {size} from images of {high} x {wide}: resize them to {size} or more first")
    down, across = high - size, wide - size
    corners = [(0, 0), (0, across), (down, 0), (down, across), (round(down / 2), round(across / 2))]
    return torch.stack(
        [view[..., y : y + size, x : x + size] for view in (images, images.flip(-1)) for y, x in corners]
    )


def _check(kappa: float) -> None:
    if not 0 < kappa <= 1:
        raise ValueError(f"kappa = {kappa}: give the share of images to label, above 0 and at most 1")
