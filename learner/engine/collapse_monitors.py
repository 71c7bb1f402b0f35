"""The six collapse monitors of a self-distillation step, computed from teacher logits, centre and embeddings.

Each is scaled so that its meaning depends neither on the number of prototypes K nor on the embedding's width D. Their
limits are in `learner.round.collapse_limits`.
"""

import math

import torch
from torch import Tensor

from learner.engine import distributed


@torch.no_grad()
def measure(teacher: Tensor, centre: Tensor, temperature: float, cls: Tensor, dino: float) -> dict[str, float]:
    """Return all monitors of a whole step, by name.

    teacher: this rank's prototype logits (R, K) of both global views; centre (1, K) as used in the loss; cls: the
    teacher's embeddings (B, D) of the unaugmented view; dino: L_dino. Means are over the images of all ranks. The rows
    must be those of all parts of the step, because three monitors compare images; these are nan for a single image.
    """
    assigned = ((teacher.float() - centre.float()) / temperature).softmax(-1)
    means = {
        "teacher_entropy": teacher_entropy(assigned),
        "teacher_kl": teacher_kl(assigned),
        "max_share": max_share(assigned),
        "cls_std": cls_std(cls),
        "centre_norm": centre_norm(centre),
    }
    samples = torch.full((), len(cls), dtype=torch.float64, device=cls.device)
    distributed.sum_over_ranks([samples])
    *numbers, count = torch.stack(
        [value.double() for value in (*means.values(), samples)]
    ).tolist()  # one wait for the GPU
    monitors = {"dino_gap": dino_gap(dino, teacher.shape[1]), **dict(zip(means, numbers, strict=True))}
    return monitors if count > 1 else monitors | dict.fromkeys(("teacher_kl", "max_share", "cls_std"), math.nan)


def measure_embeddings(cls: Tensor) -> dict[str, float]:
    """Return the only monitor of a step without prototypes, `cls_std` of embeddings (B, D); nan for a single image."""
    samples = torch.full((), len(cls), dtype=torch.float64, device=cls.device)
    distributed.sum_over_ranks([samples])
    return {"cls_std": float(cls_std(cls)) if samples > 1 else math.nan}


def dino_gap(dino: float, prototypes: int) -> float:
    """Return |L_dino / ln K - 1|: 0 is the plateau where the student gives all prototypes the same probability."""
    return abs(dino / math.log(prototypes) - 1)


def teacher_entropy(assigned: Tensor) -> Tensor:
    """Return the mean entropy of the teacher's probabilities (R, K), divided by ln K: 1 = uniform, 0 = one-hot."""
    return distributed.mean_over_ranks(_entropy(assigned)) / math.log(assigned.shape[1])


def teacher_kl(assigned: Tensor) -> Tensor:
    """Return the mean KL(p || mean p) of the teacher's probabilities p (R, K), in nats; 0 = p ignores the image.

    Equals H(mean p) - mean H(p), the mutual information of image and prototype; at most ln R. It falls to 0 in both kinds
    of collapse, uniform and one prototype (DINO, Caron et al. 2021, section 5.3).
    """
    return _entropy(distributed.mean_over_ranks(assigned)) - distributed.mean_over_ranks(_entropy(assigned))


def max_share(assigned: Tensor) -> Tensor:
    """Return the largest entry of the mean of (R, K): 1/K = all prototypes used evenly, 1 = one for all images."""
    return distributed.mean_over_ranks(assigned).max()


def cls_std(cls: Tensor) -> Tensor:
    """Return the standard deviation over images of L2-normalised embeddings (B, D), mean over D, times sqrt D.

    1 = spread over the whole sphere, 0 = all embeddings are equal.
    """
    unit = torch.nn.functional.normalize(cls.double(), dim=1)
    return distributed.mean_over_ranks((unit - distributed.mean_over_ranks(unit)).square()).sqrt().mean() * math.sqrt(
        cls.shape[1]
    )


def centre_norm(centre: Tensor) -> Tensor:
    """Return the L2 norm of the centre (1, K) divided by sqrt K, the largest norm of K cosines.

    1 = all prototypes and all embeddings point in the same direction.
    """
    return centre.double().norm() / math.sqrt(centre.shape[1])


def _entropy(assigned: Tensor) -> Tensor:
    """Return the entropy over the last axis, in nats; 0 ln 0 = 0."""
    return torch.special.entr(assigned).sum(-1, dtype=torch.float64)
