"""Targets for unlabelled images: which answers of a teacher to believe, how far, and how to keep them at the prevalence.

Knows scores, logits and labels as tensors, nan = unknown or dropped. Prevalence comes from labelled images alone: no
function here takes a label of the image it makes a target for. Every finding is treated by itself.
"""

from math import exp

import torch
from torch import Tensor, nn

SHRINKAGE = 10.0  # labelled images: with so many a finding's own rate weighs as much as the rate over all findings
NARROWEST = 1e-6  # logits: a reference side whose images all score the same has no width to divide by


def shrunk_prevalence(labels: Tensor, strength: float = SHRINKAGE) -> Tensor:
    """Prevalence (F,) from labels (N, F), nan = unknown: the mean of a Beta posterior, always inside (0, 1).

    The prior is worth `strength` images at the rate over all findings, which itself starts from one image in two.
    """
    known, positive = (~labels.isnan()).sum(0), labels.nan_to_num(0.0).sum(0)
    pooled = (positive.sum() + 0.5) / (known.sum() + 1)
    return (positive + strength * pooled) / (known + strength)


def kappa_filter(scores: Tensor, positive_ratio: float, kappa: float) -> Tensor:
    """Scores (N,) of one finding -> 1 from the int(kappa pi N)-th largest up, 0 down from the one at int(kappa (1 - pi) N)
    in ascending order counted from 0, nan between.

    Exact order statistics (Martins & Silva); the low rule wins ties. Raises ValueError for a kappa outside (0, 1].
    """
    _check(kappa)
    samples = len(scores)
    most, least = int(kappa * positive_ratio * samples), int(kappa * (1 - positive_ratio) * samples)
    ordered = scores.sort().values
    high = ordered[samples - most] if most else ordered.new_tensor(torch.inf)
    return hard_labels(scores, ordered[min(least, samples - 1)], high)


def kappa_labels(scores: Tensor, labels: Tensor, kappa: float) -> Tensor:
    """The filter for each finding of scores (N, F), its positive ratio from other images' labels (M, F); (N, F)."""
    ratios = shrunk_prevalence(labels).tolist()
    return torch.stack([kappa_filter(of, ratio, kappa) for of, ratio in zip(scores.T, ratios, strict=True)], 1)


def class_thresholds(scores: Tensor, prevalence: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    """Low and high cut (F,) of each finding: the kappa (1 - pi) and the (1 - kappa pi) quantile of scores (N, F).

    Class-aware pseudo-labelling (Xie et al. 2023), for a rolling buffer of scores; nan = not filled yet. `kappa_filter`
    is its case for a fixed set of images. Raises ValueError for a kappa outside (0, 1].
    """
    _check(kappa)
    pairs = list(zip(scores.T, prevalence, strict=True))
    low = torch.stack([of.nanquantile(kappa * (1 - ratio)) for of, ratio in pairs])
    high = torch.stack([of.nanquantile(1 - kappa * ratio) for of, ratio in pairs])
    return low, high


def hard_labels(scores: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """1 at `high` and above, 0 at `low` and below (which wins where both hold), nan between; cuts broadcast."""
    labels = torch.full_like(scores, torch.nan).masked_fill(scores >= high, 1.0)
    return labels.masked_fill(scores <= low, 0.0)


def align(logits: Tensor, mean_prob: Tensor, prevalence: Tensor) -> Tensor:
    """z - logit(mean_prob) + logit(prevalence): logits (B, F) whose mean answer moves to the prevalence (F,).

    Distribution alignment. `mean_prob` (F,) is the teacher's mean answer, see `move_mean`; start it at the prevalence.
    """
    return logits + (prevalence.logit(NARROWEST) - mean_prob.logit(NARROWEST))


def move_mean(mean_prob: Tensor, batch_mean: Tensor, momentum: float = 0.999) -> Tensor:
    """momentum mean_prob + (1 - momentum) batch_mean, both (F,): the mean over a whole batch, all parts and ranks."""
    return momentum * mean_prob + (1 - momentum) * batch_mean


class MeanPrediction(nn.Module):
    """The teacher's running mean answer (1, F), moved once a step like a centre; nan until it has seen a batch."""

    mean: Tensor

    def __init__(self, findings: int, momentum: float = 0.99) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.full((1, findings), torch.nan))

    @torch.no_grad()
    def move(self, batch_mean: Tensor) -> None:
        """mean <- momentum mean + (1 - momentum) batch mean (1, F), over a whole batch; the first is taken as it is."""
        self.mean.copy_(torch.where(self.mean.isnan(), batch_mean, move_mean(self.mean, batch_mean, self.momentum)))


def soft_weights(logits: Tensor, reference: Tensor, cut: Tensor) -> Tensor:
    """Weight in [0, 1] of each answer (B, F): 1 beyond the mean distance from the cut (F,), Gaussian on the way to it.

    Mean and deviation of that distance come from the `reference` logits (N, F), a rolling buffer, by finding and by
    side: one for both would be the negatives', and a rare positive would never weigh (after SoftMatch, Chen et al.
    2023). On a side where the reference has no image nothing is known of the distance: weight 0.
    """
    weights = torch.zeros_like(logits)
    for side in (1.0, -1.0):
        distance, seen = side * (logits - cut), side * (reference - cut)
        on = seen > 0  # nan, not filled yet, is on neither side
        samples, seen = on.sum(0), seen.where(on, 0.0)
        mean = seen.sum(0) / samples.clamp(min=1)
        variance = ((seen - mean) ** 2 * on).sum(0) / samples.clamp(min=1)
        short = (distance - mean).clamp(max=0.0)
        bell = (-(short**2) / (2 * variance.clamp(min=NARROWEST**2))).exp() * (samples > 0)
        weights = bell.where(distance > 0, weights)
    return weights


def agreement(a: Tensor, b: Tensor) -> Tensor:
    """1 - |sigmoid(a) - sigmoid(b)| of two heads' logits (B, F): 1 where they say the same, 0 where the opposite."""
    return 1 - (a.sigmoid() - b.sigmoid()).abs()


def ramp_up(t: float) -> float:
    """exp(-5 (1 - t)^2), the weight of a target at time t: .0067 at 0, 1 from 1 on (Laine & Aila 2017)."""
    return exp(-5 * (1 - min(max(t, 0.0), 1.0)) ** 2)


def ten_crop(images: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) -> (10, B, C, size, size): top left, top right, bottom left, bottom right, centre; then the
    same of the mirrored image, so that `[:5]` never shows a heart on the wrong side.

    Raises ValueError for a crop larger than the image.
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
