"""What joins DINO in later recipes: masked patches (iBOT), spread of the embeddings (KoLeo), balanced assignment.

Knows logits, embeddings and masks as tensors: no network, no image, no clock. Random masks come from uniform numbers
drawn per image elsewhere. iBOT's class-token term is `DinoLoss` as it is, so iBOT's two centres are its and `PatchLoss`'s.
"""

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = 4  # rectangles of a mask: more would fray into single patches, which their neighbours give away
MASK_NUMBERS = 2 + 4 * BLOCKS  # uniform numbers a mask needs
ASPECT = (log(0.3), log(1 / 0.3))  # of a rectangle, height over width, as in BEiT and iBOT
SMALLEST = 0.2  # side of the smallest rectangle over the largest's at the same aspect: all of them show
TINY = 1e-8  # keeps the logarithm of a distance finite, as published


class PatchLoss(nn.Module):
    """iBOT's second term: what the student guesses for a masked patch against what the teacher saw there.

    Zhou et al. 2022, Eq. 3. Only masked patches come in, so that only they need to pass the head.
    """

    centre: Tensor

    def __init__(self, prototypes: int, student_temp: float, teacher_temp: float, momentum: float) -> None:
        super().__init__()
        self.student_temp, self.teacher_temp, self.momentum = student_temp, teacher_temp, momentum
        self.register_buffer("centre", torch.zeros(1, prototypes))

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor,
        teacher_temp: float | None = None,
        assigned: Tensor | None = None,
    ) -> Tensor:
        """Logits (M, K) of the M masked patches, in the order of bool `mask` (images, ...) flattened -> scalar.

        A mean over patches within an image, then over images of both global views; an image without a masked patch
        counts as 0. The centre stays (see `move`), so the parts of a batch add up by their share of images. `assigned`
        (M, K): the teacher's answers balanced elsewhere (`sinkhorn`) in place of centred ones.
        """
        if assigned is None:
            assigned = ((teacher - self.centre) / (teacher_temp or self.teacher_temp)).softmax(-1)
        each = -(assigned.detach() * (student / self.student_temp).log_softmax(-1)).sum(-1)
        mask = mask.flatten(1)
        weight = (mask.to(each.dtype) / mask.sum(1, keepdim=True).clamp(min=1))[mask]
        return (each * weight).sum() / len(mask)

    @torch.no_grad()
    def move(self, mean_teacher: Tensor) -> None:
        """Centre <- momentum centre + (1 - momentum) mean teacher logits (1, K), over all patches as published."""
        self.centre.mul_(self.momentum).add_(mean_teacher, alpha=1 - self.momentum)


def block_masks(numbers: Tensor, side: int, ratio: tuple[float, float] = (0.1, 0.5), chance: float = 0.5) -> Tensor:
    """Uniform numbers (B, MASK_NUMBERS) -> bool (B, side, side); True = masked.

    An image is masked at all with `chance`, then `ratio` of its patches are: exactly round(r side^2) of them, at least
    one. Four rectangles of their own place, shape and size grow together until they cover that many, where iBOT
    places rectangles by trial until about that many are covered.
    """
    if not 0 <= ratio[0] <= ratio[1] <= 1:
        raise ValueError(f"ratio = {ratio}: give the smallest and the largest share of masked patches, within 0 and 1")
    chosen, share = numbers[:, 0] < chance, ratio[0] + (ratio[1] - ratio[0]) * numbers[:, 1]
    count = (share * side**2).round().clamp(min=1)
    row, column, shape, size = numbers[:, 2:, None].reshape(-1, 4, BLOCKS, 1).unbind(1)  # (B, BLOCKS, 1) each
    stretch = ((ASPECT[0] + (ASPECT[1] - ASPECT[0]) * shape) / 2).exp()
    middle = (torch.arange(side, dtype=numbers.dtype, device=numbers.device) + 0.5) / side
    down, across = (middle - row).abs() / stretch, (middle - column).abs() * stretch  # (B, BLOCKS, side)
    reach = torch.maximum(down[..., None], across[..., None, :]) / (SMALLEST + (1 - SMALLEST) * size)[..., None]
    nearest = reach.amin(1).flatten(1).argsort(dim=1, stable=True)
    rank = nearest.argsort(dim=1)
    return ((rank < count[:, None]) & chosen[:, None]).reshape(-1, side, side)


def koleo(embeddings: Tensor) -> Tensor:
    """- mean log distance of each embedding (B, D) to its nearest neighbour, after normalising; 0 for fewer than two.

    Sablayrolles et al. 2019 as DINOv2 uses it: pushes the images of a batch apart.
    """
    if len(embeddings) < 2:
        return embeddings.sum() * 0.0
    unit = F.normalize(embeddings, dim=-1, eps=TINY)
    with torch.no_grad():
        nearest = (unit @ unit.T).fill_diagonal_(-1.0).argmax(1)
    return -(F.pairwise_distance(unit, unit[nearest], eps=TINY) + TINY).log().mean()


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Teacher logits (B, K) of a whole batch -> targets (B, K): rows sum to 1, columns towards B / K.

    Sinkhorn-Knopp, in place of a centre; in logarithms, so that no temperature overflows. All rows of a batch must be
    there: of parts or ranks, gather them first.
    """
    scores = logits / temperature
    for _ in range(iterations):
        scores = scores - scores.logsumexp(0, keepdim=True)
        scores = scores - scores.logsumexp(1, keepdim=True)
    return scores.exp()
