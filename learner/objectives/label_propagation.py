"""Pseudo-labels from neighbours: images that look alike to the encoder share labels along a k-nearest-neighbour graph.

Label propagation (Zhou et al., "Learning with local and global consistency", 2004) on whitened features, one finding
against its absence at a time. Features and a table of labels in, soft targets out; knows no network and no file.
"""

import torch
from torch import Tensor

DAMPING = 0.95  # share that comes from neighbours at each pass; the rest is the seeds
PASSES = 60  # 0.95^60 = 5 %: what is further away than that many edges hardly counts
FLAT = 1e-5  # share of the largest variance below which a direction is rounding and isn't blown up to 1
CHUNK = 1024  # images whose distances to all others are held at once
EXACT = 100_000  # images up to which neighbours are exact; beyond, they are looked for in the nearest cells only
SHARPNESS = 2.0  # slope of soft targets over the logit of the rank (bench/learning/evolution_refit.py)
PROBES = 8  # cells that are searched for each image then


def whiten(features: Tensor, components: int) -> Tensor:
    """Features (N, D) -> their leading principal components (N, C), each of variance 1, in float32."""
    x = features.double()
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    kept = vectors[:, -min(components, len(x) - 1, x.shape[1]) :]
    spread = values[-kept.shape[1] :].clamp(min=values[-1] * FLAT).sqrt()
    return (x @ kept / spread).float()


def neighbours(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosine similarity (N, count) and index (N, count) of each image's nearest others.

    Exact up to EXACT images; beyond, among the images of the PROBES nearest of sqrt(N) cells (k-means on a sample).
    """
    points = torch.nn.functional.normalize(points, dim=1)
    count = min(count, len(points) - 1)
    cells = _cells(points) if len(points) > EXACT else None
    near, where = [], []
    for low in range(0, len(points), CHUNK):
        part = points[low : low + CHUNK]
        if cells is None:
            close = part @ points.T
            close[torch.arange(len(part)), torch.arange(low, low + len(part))] = -2.0  # not oneself
            value, index = close.topk(count, dim=1)
        else:
            value, index = _in_cells(points, part, low, count, *cells)
        near.append(value)
        where.append(index)
    return torch.cat(near), torch.cat(where)


def _cells(points: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Centres (C, D), the cell of each image (N,) and the images of each cell."""
    number = int(len(points) ** 0.5)
    take = torch.linspace(0, len(points) - 1, min(len(points), 64 * number)).long()
    sample = points[take]
    centres = sample[torch.linspace(0, len(sample) - 1, number).long()]
    for _ in range(5):  # cells only have to be even, not optimal
        nearest = (sample @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, sample)
        centres = torch.nn.functional.normalize(torch.where(sums.any(1, keepdim=True), sums, centres), dim=1)
    cell = torch.cat([(part @ centres.T).argmax(1) for part in points.split(CHUNK)])
    order = cell.argsort()
    return centres, cell, list(order.split(torch.bincount(cell, minlength=number).tolist()))


def _in_cells(
    points: Tensor, part: Tensor, low: int, count: int, centres: Tensor, cell: Tensor, samples: list[Tensor]
) -> tuple[Tensor, Tensor]:
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
    """The symmetric, degree-normalised graph (N, N), sparse: D^-1/2 W D^-1/2, w = exp(-d^2 / median d^2)."""
    samples, count = near.shape
    distance = (2 - 2 * near).clamp(min=0)
    weight = torch.exp(-distance / distance.median().clamp(min=1e-12))
    rows = torch.arange(samples).repeat_interleave(count)
    there = _sparse(torch.stack([rows, where.flatten()]), weight.flatten(), samples)
    both = (there + there.T).coalesce()
    degree = torch.zeros(samples).index_add_(0, both.indices()[0], both.values()).clamp(min=1e-12).rsqrt()
    values = both.values() * degree[both.indices()[0]] * degree[both.indices()[1]]
    return _sparse(both.indices(), values, samples)


def _sparse(places: Tensor, values: Tensor, samples: int) -> Tensor:
    return torch.sparse_coo_tensor(places, values, (samples, samples), check_invariants=True).coalesce()


def propagate(graph: Tensor, labels: Tensor, damping: float = DAMPING, passes: int = PASSES) -> Tensor:
    """log of how much the positives reach an image over how much the negatives do: (N, F); labels (N, F), nan = unknown.

    Both classes start with the same mass, so the rarer one isn't drowned. A finding without both classes gives 0.
    """
    samples, findings = labels.shape
    seeds = torch.stack([labels == 1, labels == 0], 2).float()  # (N, F, 2)
    both = (seeds.sum(0) > 0).all(1)
    seeds = (seeds / seeds.sum(0, keepdim=True).clamp(min=1)).reshape(samples, -1)
    mass = seeds
    for _ in range(passes):
        mass = damping * (graph @ mass) + (1 - damping) * seeds
    positive, negative = mass.reshape(samples, findings, 2).clamp(min=1e-12).log().unbind(2)
    return torch.where(both, positive - negative, torch.zeros_like(positive))


def soft_targets_by_rank(scores: Tensor, prevalence: Tensor) -> Tensor:
    """Scores (N, F) -> soft targets (N, F): SHARPNESS times the rank's logit, `prevalence` (F,) of them above 0.5.

    Only the order of the scores counts: propagated mass has no scale that could be read as a probability.
    """
    rank = scores.argsort(0).argsort(0)
    place = (rank + 0.5) / len(scores)
    return (SHARPNESS * (torch.logit(place.float()) - torch.logit(1 - prevalence.float()))).sigmoid()


def pseudo_labels(features: Tensor, labels: Tensor, prevalence: Tensor, count: int, components: int) -> Tensor:
    """Soft targets (N, F) for all images from features (N, D) and labels (N, F), nan = unknown; known labels stay.

    A finding without both classes among the labels has no target (nan).
    """
    near, where = neighbours(whiten(features, components), count)
    scores = propagate(affinity(near, where), labels)
    soft = soft_targets_by_rank(scores, prevalence)
    soft = torch.where(has_both_classes(labels), soft, torch.full_like(soft, float("nan")))
    return torch.where(labels.isnan(), soft, labels)


def has_both_classes(labels: Tensor) -> Tensor:
    """Bool (F,): the findings of labels (N, F), nan = unknown, that a positive and a negative image were labelled for."""
    return (labels == 1).any(0) & (labels == 0).any(0)
