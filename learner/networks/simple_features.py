"""Simple features of plates: grey levels, and responses to patches that occur often on the site's own images.

Patch features are the single-layer network of Coates, Lee and Ng ("An analysis of single-layer networks in unsupervised
feature learning", AISTATS 2011): k-means centroids of whitened patches, and the triangle activation. Both are plain
tensor operations, which ONNX has.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from cxrloop.plate import PLATE_SHAPE
from learner.networks.pooling import CELLS, cell_weights, resize_matrix

SIDE = 24  # pixels a side of the reduced image, as in `learner.evaluation.pixel_baseline`
PATCH = 8  # pixels a side of a patch
STRIDES = {64: 2, 192: 8, 256: 12}  # image sides in pixels, and the distance of two patches on them
SIDES = (64, 256)  # that are learnt; models with other sides stay readable
CONTRAST = 10 / 255**2  # added to a patch's variance: noise in dark corners stays small (Coates et al., section 3.2.1)


class Pixels(nn.Module):
    """Grey levels in [0, 1], (B, 512, 512), to the means of 24 x 24 areas, (B, 576)."""

    side = SIDE  # of `contributions`
    areas: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("areas", cell_weights(PLATE_SHAPE[0], SIDE), persistent=False)

    def forward(self, grey: Tensor) -> Tensor:
        return (self.areas @ grey @ self.areas.T).flatten(1)

    def contributions(self, grey: Tensor, weight: Tensor, mean: Tensor) -> Tensor:
        """Return what each place adds to weight (F, 576) . (features - mean), (B, F, 24, 24)."""
        return ((self(grey) - mean)[:, None] * weight).unflatten(-1, (SIDE, SIDE))


class Patches(nn.Module):
    """Grey levels in [0, 1], (B, 512, 512), to patch features (B, 16 K): means over 4 x 4 cells, of image and mirror image.

    whiten (64, 64) and offset (64,) take a patch of mean 0 and contrast 1 to whitened values; centroids (K, 64).
    """

    whiten: Tensor
    offset: Tensor
    centroids: Tensor
    matrix: Tensor
    cells: Tensor

    def __init__(self, size: int, whiten: Tensor, offset: Tensor, centroids: Tensor) -> None:
        super().__init__()
        self.size = size
        for name, value in (("whiten", whiten), ("offset", offset), ("centroids", centroids)):
            self.register_buffer(name, value)
        self.register_buffer("matrix", resize_matrix(PLATE_SHAPE[0], size).to(whiten), persistent=False)
        self.side = (size - PATCH) // STRIDES[size] + 1  # patches in a row, and of `contributions`
        self.register_buffer("cells", cell_weights(self.side, CELLS).to(whiten), persistent=False)

    def forward(self, grey: Tensor) -> Tensor:
        images = self.matrix @ grey @ self.matrix.T
        return (self._cells(images) + self._cells(images.flip(-1))) / 2

    def _cells(self, images: Tensor) -> Tensor:
        return (self.cells @ self.activations(images) @ self.cells.T).flatten(1)

    def activations(self, images: Tensor) -> Tensor:
        """Return triangle activations max(0, mean distance - distance), (B, K, h, w), of images (B, size, size)."""
        white = whitened_patches(images, STRIDES[self.size], self.whiten, self.offset)
        products = F.conv2d(white, self.centroids[:, :, None, None])
        lengths = self.centroids.square().sum(1)[:, None, None]
        distance = (white.square().sum(1, keepdim=True) + lengths - 2 * products).clamp(min=1e-6).sqrt()
        return (distance.mean(1, keepdim=True) - distance).relu()

    def contributions(self, grey: Tensor, weight: Tensor, mean: Tensor) -> Tensor:
        """Return what each place adds to weight (F, 16 K) . (features - mean), (B, F, h, w)."""
        images = self.matrix @ grey @ self.matrix.T
        straight = self._contributions(images, weight, mean)
        mirrored = self._contributions(images.flip(-1), weight, mean).flip(-1)
        return (straight + mirrored) / 2

    def _contributions(self, images: Tensor, weight: Tensor, mean: Tensor) -> Tensor:
        active = self.activations(images)
        cells = (self.cells[:, None, :, None] * self.cells[None, :, None, :]).flatten(2).flatten(0, 1)  # (16, h w)
        by_cell = weight.unflatten(-1, (-1, CELLS * CELLS)).transpose(1, 2)  # (F, 16, K)
        sums = by_cell[None] @ active.flatten(2)[:, None]  # (B, F, 16, h w)
        level = (by_cell * mean.unflatten(-1, (-1, CELLS * CELLS)).T).sum(-1)  # (F, 16): the mean image's part
        return ((sums - level[..., None]) * cells).sum(2).unflatten(-1, (self.side, self.side))


def whitened_patches(images: Tensor, stride: int, whiten: Tensor, offset: Tensor) -> Tensor:
    """Return whitened patches, (B, 64, h, w), of images (B, s, s): each patch less its mean, divided by its contrast."""
    kernels = whiten.T.reshape(-1, 1, PATCH, PATCH)
    images = images[:, None]
    mean = F.avg_pool2d(images, PATCH, stride)
    variance = (F.avg_pool2d(images.square(), PATCH, stride) - mean.square()).clamp(min=0)
    sums = whiten.sum(0)[:, None, None]
    centred = (F.conv2d(images, kernels, stride=stride) - mean * sums) / (variance + CONTRAST).sqrt()
    return centred - offset[:, None, None]
