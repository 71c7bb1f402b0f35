"""Learn patch features from images without labels: contrast, whitening, k-means (Coates, Lee and Ng, AISTATS 2011)."""

import torch
from torch import Tensor

from learner.networks.simple_features import CONTRAST, PATCH, Patches

CENTROIDS = 400
SAMPLES = 60_000  # patches drawn from all images together, and at most SAMPLES_EACH for each image
SAMPLES_EACH = 1000
ITERATIONS = 12
SMALLEST = 0.1  # added to the eigenvalues before whitening: rounding noise of flat patches is not scaled up
CHUNK = 20_000  # patches whose distances are in memory at once


def learn_patches(images: Tensor, seed: int) -> Patches:
    """Return the patch features learnt from images, float (N, s, s) in [0, 1], s a key of `simple_features.STRIDES`.

    The same images and seed give the same features. With fewer distinct patches than centroids some centroids repeat.
    """
    draw = torch.Generator().manual_seed(seed)
    patches = contrast_normalised(_random_patches(images, draw))
    mean = patches.mean(0)
    centred = patches - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(patches))
    whiten = vectors * (values.clamp(min=0) + SMALLEST).rsqrt() @ vectors.T
    return Patches(images.shape[-1], whiten, mean @ whiten, _centroids(centred @ whiten, draw))


def contrast_normalised(patches: Tensor) -> Tensor:
    """Return patches (N, 64), each less its mean and divided by its contrast."""
    centred = patches - patches.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + CONTRAST).sqrt()


def _random_patches(images: Tensor, draw: torch.Generator) -> Tensor:
    count, side = images.shape[0], images.shape[-1] - PATCH + 1
    samples = min(SAMPLES, SAMPLES_EACH * count)
    which = torch.randint(count, (samples,), generator=draw)
    top, left = (torch.randint(side, (samples,), generator=draw) for _ in range(2))
    inside = torch.arange(PATCH)
    rows, columns = top[:, None, None] + inside[None, :, None], left[:, None, None] + inside[None, None, :]
    return images[which[:, None, None], rows, columns].flatten(1)


def _centroids(points: Tensor, draw: torch.Generator) -> Tensor:
    """Return CENTROIDS centroids (K, 64) of points (N, 64) by Lloyd's k-means; an empty cell gets a random point."""
    centroids = points[torch.randperm(len(points), generator=draw)[:CENTROIDS]].clone()
    for _ in range(ITERATIONS):
        nearest = torch.cat([torch.cdist(part, centroids).argmin(1) for part in points.split(CHUNK)])
        counts = torch.bincount(nearest, minlength=CENTROIDS)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, points)
        empty = counts == 0
        fresh = points[torch.randint(len(points), (CENTROIDS,), generator=draw)]
        centroids = torch.where(empty[:, None], fresh, sums / counts.clamp(min=1)[:, None])
    return centroids
