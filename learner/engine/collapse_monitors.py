"""The collapse monitors of one self-distillation step: tensors in, six plain numbers out.

Every number is scaled so that neither the prototypes (K) nor the embedding (D) change what it means. What is too much
or too little, and for how long, is `collapse`'s matter; steps, phases and files are unknown here.
"""

import math

import torch
from torch import Tensor

from learner.engine import distributed


@torch.no_grad()
def measure(teacher: Tensor, centre: Tensor, temperature: float, cls: Tensor, dino: float) -> dict[str, float]:
    """All monitors of a whole step.

    teacher: prototype logits (R, K) of both global views; centre (1, K) as the loss subtracted it; cls: the teacher's
    embedding (B, D) of the original view; dino: L_dino. A step taken in parts concatenates the rows of its parts first:
    three of these compare images, so an average over parts would depend on the parts. For a single image they are nan.
    Every mean is over the images of all ranks, each of which brings its own.
    """
    assigned = ((teacher.float() - centre.float()) / temperature).softmax(-1)
    seen = {
        "teacher_entropy": teacher_entropy(assigned),
        "teacher_kl": teacher_kl(assigned),
        "max_share": max_share(assigned),
        "cls_std": cls_std(cls),
        "centre_norm": centre_norm(centre),
    }
    samples = torch.full((), len(cls), dtype=torch.float64, device=cls.device)
    distributed.sum_over_ranks([samples])
    *numbers, count = torch.stack([value.double() for value in (*seen.values(), samples)]).tolist()  # one wait
    shown = {"dino_gap": dino_gap(dino, teacher.shape[1]), **dict(zip(seen, numbers, strict=True))}
    return shown if count > 1 else shown | dict.fromkeys(("teacher_kl", "max_share", "cls_std"), math.nan)


def measure_embeddings(cls: Tensor) -> dict[str, float]:
    """The one monitor of a step without prototypes: `cls_std` of embeddings (B, D), nan for a single image."""
    samples = torch.full((), len(cls), dtype=torch.float64, device=cls.device)
    distributed.sum_over_ranks([samples])
    return {"cls_std": float(cls_std(cls)) if samples > 1 else math.nan}


def dino_gap(dino: float, prototypes: int) -> float:
    """|L_dino / ln K - 1|: 0 is the plateau where the student gives every prototype the same answer."""
    return abs(dino / math.log(prototypes) - 1)


def teacher_entropy(assigned: Tensor) -> Tensor:
    """Mean entropy of the teacher's answers (R, K), over ln K: 1 = uniform, 0 = each image on one prototype."""
    return distributed.mean_over_ranks(_entropy(assigned)) / math.log(assigned.shape[1])


def teacher_kl(assigned: Tensor) -> Tensor:
    """Mean KL(answer || mean answer) of (R, K), in nats: what an answer tells about its image; 0 = nothing.

    Equals H(mean) - mean H, the mutual information of image and prototype; at most ln R. It falls to 0 in either kind
    of collapse, uniform or one prototype (DINO, Caron et al. 2021, section 5.3).
    """
    return _entropy(distributed.mean_over_ranks(assigned)) - distributed.mean_over_ranks(_entropy(assigned))


def max_share(assigned: Tensor) -> Tensor:
    """The largest prototype's share of the mean answer of (R, K): 1/K = evenly used, 1 = one takes all."""
    return distributed.mean_over_ranks(assigned).max()


def cls_std(cls: Tensor) -> Tensor:
    """Mean over dimensions of the deviation between images of L2-normalised CLS (B, D), times sqrt D.

    1 = spread over the whole sphere, 0 = all images look the same.
    """
    unit = torch.nn.functional.normalize(cls.double(), dim=1)
    return distributed.mean_over_ranks((unit - distributed.mean_over_ranks(unit)).square()).sqrt().mean() * math.sqrt(
        cls.shape[1]
    )


def centre_norm(centre: Tensor) -> Tensor:
    """Length of the centre (1, K) over sqrt K, the longest a mean of cosines can be: 1 = all prototypes and images agree."""
    return centre.double().norm() / math.sqrt(centre.shape[1])


def _entropy(assigned: Tensor) -> Tensor:
    """Nats, over the last axis; 0 ln 0 = 0."""
    return torch.special.entr(assigned).sum(-1, dtype=torch.float64)
