"""Pseudo-labels from a k-nearest-neighbour graph of image features.

Label propagation (Zhou et al., "Learning with local and global consistency", NIPS 2003) on whitened features, for each
finding on its own.
"""

import torch
from torch import Tensor

DAMPING = 0.95  # share of the neighbours in each iteration (alpha of Zhou et al.); the rest is the labels
ITERATIONS = 60  # 0.95^60 = 5 %: labels more than 60 edges away have little effect
FLAT = (
    1e-5  # components with less than this share of the largest variance are rounding errors; not scaled to variance 1
)
CHUNK = 1024  # images whose distances to all others are in memory at once
EXACT = 100_000  # largest number of images with exact neighbours; with more, only the nearest cells are searched
SHARPNESS = 2.0  # slope of soft targets over the logit of the rank (bench/learning/evolution_refit.py)
PROBES = 8  # cells searched for each image


def whiten(features: Tensor, components: int) -> Tensor:
    """Return the leading principal components (N, C) of features (N, D), each scaled to variance 1, float32."""
    x = features.double()
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    kept = vectors[:, -min(components, len(x) - 1, x.shape[1]) :]
    spread = values[-kept.shape[1] :].clamp(min=values[-1] * FLAT).sqrt()
    return (x @ kept / spread).float()


def neighbours(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return cosine similarity (N, count) and index (N, count) of each image's nearest neighbours; points (N, C).

    Exact up to EXACT images. With more, searches the PROBES nearest of sqrt(N) k-means cells.
    """
    points = torch.nn.functional.normalize(points, dim=1)
    count = min(count, len(points) - 1)
    cells = _cells(points) if len(points) > EXACT else None
    near, where = [], []
    for low in range(0, len(points), CHUNK):
        part = points[low : low + CHUNK]
        if cells is None:
            close = part @ points.T
            close[torch.arange(len(part)), torch.arange(low, low + len(part))] = -2.0  # not the image itself
            value, index = close.topk(count, dim=1)
        else:
            value, index = _in_cells(points, part, low, count, *cells)
        near.append(value)
        where.append(index)
    return torch.cat(near), torch.cat(where)


def _cells(points: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return k-means cells of points (N, D): centres (C, D), the cell of each image (N,), the images of each cell."""
    number = int(len(points) ** 0.5)
    take = torch.linspace(0, len(points) - 1, min(len(points), 64 * number)).long()
    sample = points[take]
    centres = sample[torch.linspace(0, len(sample) - 1, number).long()]
    for _ in range(5):  # cells need similar sizes, not the optimum
        nearest = (sample @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, sample)
        centres = torch.nn.functional.normalize(torch.where(sums.any(1, keepdim=True), sums, centres), dim=1)
    cell = torch.cat([(part @ centres.T).argmax(1) for part in points.split(CHUNK)])
    order = cell.argsort()
    return centres, cell, list(order.split(torch.bincount(cell, minlength=number).tolist()))


def _in_cells(
    points: Tensor, part: Tensor, low: int, count: int, centres: Tensor, cell: Tensor, samples: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return `neighbours` of the images `part`, which start at `low`, among the images of their nearest cells."""
    value = part.new_full((len(part), count), -2.0)
    index = torch.zeros(len(part), count, dtype=torch.long)
    probes = (part @ centres.T).topk(min(PROBES, len(centres)), dim=1).indices
    for c in probes.unique():
        rows = (probes == c).any(1).nonzero()[:, 0]
        close = part[rows] @ points[samples[c]].T
        close[(rows + low)[:, None] == samples[c][None]] = -2.0
        both = torch.cat([value[rows], close], 1)
        which = torch.cat([index[rows], samples[c].expand(len(rows), -1)], 1)
        best, place = both.topk(count, dim=1)
        value[rows], index[rows] = best, which.gather(1, place)
    return value, index


def affinity(near: Tensor, where: Tensor) -> Tensor:
    """Return the sparse graph D^-1/2 W D^-1/2 (N, N), with weights w = exp(-d^2 / median d^2) (Zhou et al. 2003, step 2).

    near, where: similarities and indices (N, count) of `neighbours`; W is made symmetric.
    """
    samples, count = near.shape
    distance = (2 - 2 * near).clamp(min=0)
    weight = torch.exp(-distance / distance.median().clamp(min=1e-12))
    rows = torch.arange(samples).repeat_interleave(count)
    directed = _sparse(torch.stack([rows, where.flatten()]), weight.flatten(), samples)
    both = (directed + directed.T).coalesce()
    degree = torch.zeros(samples).index_add_(0, both.indices()[0], both.values()).clamp(min=1e-12).rsqrt()
    values = both.values() * degree[both.indices()[0]] * degree[both.indices()[1]]
    return _sparse(both.indices(), values, samples)


def _sparse(places: Tensor, values: Tensor, samples: int) -> Tensor:
    return torch.sparse_coo_tensor(places, values, (samples, samples), check_invariants=True).coalesce()


def propagate(graph: Tensor, labels: Tensor, damping: float = DAMPING, iterations: int = ITERATIONS) -> Tensor:
    """Return scores (N, F): log of the mass that reaches an image from positives, minus the same from negatives.

    labels (N, F), nan = unknown. Iterates F <- damping graph F + (1 - damping) labels (Zhou et al. 2003, step 3). Both
    classes start with the same total mass, whatever their numbers. A finding without both classes has score 0.
    """
    samples, findings = labels.shape
    seeds = torch.stack([labels == 1, labels == 0], 2).float()  # (N, F, 2)
    has_both = (seeds.sum(0) > 0).all(1)
    seeds = (seeds / seeds.sum(0, keepdim=True).clamp(min=1)).reshape(samples, -1)
    mass = seeds
    for _ in range(iterations):
        mass = damping * (graph @ mass) + (1 - damping) * seeds
    positive, negative = mass.reshape(samples, findings, 2).clamp(min=1e-12).log().unbind(2)
    return torch.where(has_both, positive - negative, torch.zeros_like(positive))


def soft_targets_by_rank(scores: Tensor, prevalence: Tensor) -> Tensor:
    """Return soft targets (N, F): sigmoid of SHARPNESS times the logit of the rank; a share `prevalence` (F,) is above 0.5.

    Uses only the order of the scores (N, F), because propagated mass has no scale.
    """
    rank = scores.argsort(0).argsort(0)
    quantile = (rank + 0.5) / len(scores)
    return (SHARPNESS * (torch.logit(quantile.float()) - torch.logit(1 - prevalence.float()))).sigmoid()


def pseudo_labels(features: Tensor, labels: Tensor, prevalence: Tensor, count: int, components: int) -> Tensor:
    """Return soft targets (N, F) from features (N, D) and labels (N, F), nan = unknown; known labels are kept.

    `count` neighbours, `components` principal components. A finding without labels of both classes gets nan.
    """
    near, where = neighbours(whiten(features, components), count)
    scores = propagate(affinity(near, where), labels)
    soft = soft_targets_by_rank(scores, prevalence)
    soft = torch.where(has_both_classes(labels), soft, torch.full_like(soft, float("nan")))
    return torch.where(labels.isnan(), soft, labels)


def has_both_classes(labels: Tensor) -> Tensor:
    """Return bool (F,): whether labels (N, F), nan = unknown, have a positive and a negative image of the finding."""
    return (labels == 1).any(0) & (labels == 0).any(0)
