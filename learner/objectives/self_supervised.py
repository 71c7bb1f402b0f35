"""Self-supervised losses beside DINO: masked patches (iBOT), KoLeo, and Sinkhorn assignment.

iBOT's class-token term is `dino.DinoLoss`. Masks are made from uniform numbers that the caller draws for each image.
"""

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = 4  # rectangles of a mask; more would leave single masked patches, which are easy to predict
MASK_NUMBERS = 2 + 4 * BLOCKS  # uniform numbers of a mask
ASPECT = (log(0.3), log(1 / 0.3))  # of a rectangle, height over width, as in BEiT and iBOT
SMALLEST = 0.2  # side of the smallest rectangle, as a share of the largest with the same aspect ratio
TINY = 1e-8  # keeps the logarithm of a distance finite, as in DINOv2


class PatchLoss(nn.Module):
    """iBOT's masked-patch loss: cross-entropy of the student's masked patches with the teacher's visible ones.

    Zhou et al., ICLR 2022, Eq. 3. Takes the logits of masked patches only.
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
        """Return the loss of logits (M, K) of the M masked patches, in the order of bool `mask` (images, h, w) flattened.

        The mean over the patches of an image, then over the images of both global views; an image without masked patches
        counts as 0. Does not move the centre. `assigned` (M, K): teacher probabilities of `sinkhorn`, in place of centred
        ones.
        """
        if assigned is None:
            assigned = ((teacher - self.centre) / (teacher_temp or self.teacher_temp)).softmax(-1)
        each = -(assigned.detach() * (student / self.student_temp).log_softmax(-1)).sum(-1)
        mask = mask.flatten(1)
        weight = (mask.to(each.dtype) / mask.sum(1, keepdim=True).clamp(min=1))[mask]
        return (each * weight).sum() / len(mask)

    @torch.no_grad()
    def move(self, mean_teacher: Tensor) -> None:
        """Set the centre to m centre + (1 - m) mean teacher logits (1, K) of the patches."""
        self.centre.mul_(self.momentum).add_(mean_teacher, alpha=1 - self.momentum)


def block_masks(numbers: Tensor, side: int, ratio: tuple[float, float] = (0.1, 0.5), chance: float = 0.5) -> Tensor:
    """Return masks, bool (B, side, side), from uniform numbers (B, MASK_NUMBERS); True = masked.

    An image is masked with probability `chance`; then exactly round(r side^2) patches are, at least one, r uniform in
    `ratio`. Four random rectangles grow together until they cover that many patches; iBOT instead places rectangles until
    about that many are covered.
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
    """Return minus the mean log distance of normalised embeddings (B, D) to their nearest neighbour; 0 for B < 2.

    KoLeo (Sablayrolles et al., ICLR 2019) as in DINOv2: spreads the embeddings of a batch.
    """
    if len(embeddings) < 2:
        return embeddings.sum() * 0.0
    unit = F.normalize(embeddings, dim=-1, eps=TINY)
    with torch.no_grad():
        nearest = (unit @ unit.T).fill_diagonal_(-1.0).argmax(1)
    return -(F.pairwise_distance(unit, unit[nearest], eps=TINY) + TINY).log().mean()


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Return targets (B, K) from teacher logits (B, K): rows sum to 1, columns tend to B / K.

    Sinkhorn-Knopp (Caron et al., SwAV, NeurIPS 2020), in logarithms against overflow. Needs all rows of the batch: gather
    those of parts and ranks first (`batchwise`).
    """
    scores = logits / temperature
    for _ in range(iterations):
        scores = scores - scores.logsumexp(0, keepdim=True)
        scores = scores - scores.logsumexp(1, keepdim=True)
    return scores.exp()
