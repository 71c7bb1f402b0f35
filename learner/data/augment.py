"""Plates to network inputs, and the random views of DISTL, as batched tensor arithmetic on any device.

Resizing, cropping and blurring are products with small matrices, `R @ x @ R.T`; the exported graph uses the very same
`resize_matrix`, so training and serving can't skew. Randomness comes in as uniform numbers drawn per image elsewhere:
this file draws none, so a view depends on nothing but its image and its numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

from learner.round.recipe import Recipe

TRIES = 10  # draws of area and aspect before a crop falls back to the whole image, as torchvision does
NUMBERS_PER_VIEW = 2 * TRIES + 8  # uniform numbers a view needs
ASPECT = (log(3 / 4), log(4 / 3))
BLUR = (0.1, 2.0)  # sigma in pixels


def resize_matrix(old: int, new: int) -> Tensor:
    """R (new, old) so that R @ x @ R.T is the antialiased bilinear resize of x (old, old); rows sum to 1."""
    scale = old / new
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * scale - 0.5
    reach = (torch.arange(old, dtype=torch.float64)[None] - centres[:, None]).abs() / max(scale, 1.0)
    rows = (1 - reach).clamp(min=0)
    return (rows / rows.sum(1, keepdim=True)).float()


def to_image(plates: Tensor, matrix: Tensor) -> Tensor:
    """uint8 plates (B, 512, 512) -> images (B, 1, S, S) in [0, 1]."""
    grey = plates.to(matrix.dtype) / 255
    return (matrix @ grey @ matrix.T)[:, None]


def normalise(images: Tensor, recipe: Recipe) -> Tensor:
    """Images in [0, 1] as the network wants them."""
    return (images - recipe.mean) / recipe.std


@dataclass(frozen=True)
class Augmentation:
    """How hard a kind of view is treated."""

    size: int
    scale: tuple[float, float]
    rotate: float
    chance: float  # of each of autocontrast, equalise and blur
    flip: bool


def make_views(images: Tensor, numbers: Tensor, recipe: Recipe) -> list[Tensor]:
    """Images (B, 1, S, S), numbers (B, views - 1, NUMBERS_PER_VIEW) -> original, noised global, locals; each (B, 1, s, s).

    The numbers stay in host memory: what is chosen is known there without waiting for a device.
    """
    whole = Augmentation(recipe.image_size, recipe.global_scale, recipe.rotate, recipe.global_noise, recipe.flip)
    part = Augmentation(recipe.local_size, recipe.local_scale, recipe.rotate, recipe.local_noise, recipe.flip)
    noised = [
        augmented_views(images, n, noise) for n, noise in ((numbers[:, :1], whole), (numbers[:, 1:], part)) if n.numel()
    ]
    return [normalise(v, recipe) for v in [images, *(v for views in noised for v in views)]]


def augmented_views(images: Tensor, numbers: Tensor, noise: Augmentation) -> Tensor:
    """V random views of each image (V, B, 1, s, s), in the published order: crop, flip, rotate, contrast, equalise, blur.

    Images (B, 1, S, S), numbers (B, V, NUMBERS_PER_VIEW). All views of all images go through each operation at once; the last
    three are done for the chosen views alone.
    """
    samples, views = numbers.shape[:2]
    flat, side = numbers.flatten(0, 1), images.shape[-1]
    flip, angle, auto, equal, blurred, sigma = flat[:, 2 * TRIES + 2 :].unbind(1)
    settings = [*crop_boxes(flat, side, noise.scale), (2 * angle - 1) * noise.rotate]
    settings.append(BLUR[0] + sigma * (BLUR[1] - BLUR[0]))
    top, left, high, wide, degrees, width = torch.stack(settings).to(images.device).unbind()
    down = crop_matrix(top, high, side, noise.size)  # (B V, s, S)
    across = crop_matrix(left, wide, side, noise.size)
    # the V matrices of one image stand on top of each other: the image itself is never copied
    rows = (down.view(samples, views * noise.size, side) @ images[:, 0]).view_as(down)
    out = (rows @ across.transpose(1, 2)).clamp(0, 1)
    if noise.flip:
        out = apply_where(out, flip < 0.5, lambda chosen, _: chosen.flip(-1))
    out = rotate(out, degrees)
    out = apply_where(out, auto < noise.chance, lambda chosen, _: autocontrast(chosen))
    out = apply_where(out, equal < noise.chance, lambda chosen, _: equalise(chosen))
    out = apply_where(out, blurred < noise.chance, lambda chosen, which: blur(chosen, width[which]))
    return out.unflatten(0, (samples, views)).transpose(0, 1)[:, :, None]


def apply_where(images: Tensor, chosen: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Images (N, s, s) with `change(those, their places)` done to the chosen ones; chosen (N,) bool, in host memory."""
    which = chosen.nonzero()[:, 0].to(images.device)
    return images.index_copy(0, which, change(images[which], which)) if len(which) else images


def crop_boxes(numbers: Tensor, side: int, scale: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height and width in whole pixels (B,): the first of ten draws of area and aspect that fits."""
    area = side * side * (scale[0] + numbers[:, :TRIES] * (scale[1] - scale[0]))
    aspect = (ASPECT[0] + numbers[:, TRIES : 2 * TRIES] * (ASPECT[1] - ASPECT[0])).exp()
    wide, high = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (wide <= side) & (high <= side) & (wide > 0) & (high > 0)
    first = fits.int().argmax(1, keepdim=True)
    found = fits.any(1)
    wide = torch.where(found, wide.gather(1, first)[:, 0], float(side))
    high = torch.where(found, high.gather(1, first)[:, 0], float(side))
    top = (numbers[:, 2 * TRIES] * (side - high + 1)).floor()
    left = (numbers[:, 2 * TRIES + 1] * (side - wide + 1)).floor()
    return top, left, high, wide


def crop_matrix(start: Tensor, length: Tensor, old: int, new: int) -> Tensor:
    """(B, new, old): crop [start, start + length) and resize it to `new`, antialiased bicubic (a = -.5), edges kept."""
    scale = (length / new)[:, None, None]
    places = torch.arange(old, device=start.device, dtype=start.dtype)[None, None]
    steps = torch.arange(new, device=start.device, dtype=start.dtype)[None, :, None]
    first, last = start[:, None, None], (start + length)[:, None, None]
    x = ((places - (first + (steps + 0.5) * scale - 0.5)) / scale.clamp(min=1)).abs()
    x = x.clamp(max=2)  # the outer branch ends in 0 there
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    rows = torch.where(x < 1, near, far) * ((places >= first) & (places < last))
    return rows / rows.sum(-1, keepdim=True)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotate (B, S, S) about the centre, bilinear, outside is 0."""
    angle = torch.deg2rad(degrees)
    zero = torch.zeros_like(angle)
    turn = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(turn, [len(images), 1, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each image (B, S, S) to [0, 1]; a flat one stays."""
    low, high = images.amin((1, 2), keepdim=True), images.amax((1, 2), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-12), images)


def equalise(images: Tensor) -> Tensor:
    """Histogram equalisation of (B, S, S) over 256 levels, with PIL's rounding."""
    levels = (images * 255).round().long().flatten(1)
    counts = torch.zeros(len(images), 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels))
    top = 255 - (counts.flip(1) > 0).int().argmax(1, keepdim=True)  # brightest level present
    step = (counts.sum(1, keepdim=True) - counts.gather(1, top)) // 255
    table = (counts.cumsum(1) - counts + step // 2) // step.clamp(min=1)
    even = table.clamp(0, 255).gather(1, levels).to(images.dtype).view_as(images) / 255
    return torch.where((step > 0)[:, :, None], even, images)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of (B, S, S) by sigma (B,) pixels, as a band matrix whose rows sum to 1."""
    places = torch.arange(images.shape[-1], device=images.device)
    bell = torch.exp(-0.5 * (places / sigma[:, None]) ** 2)  # (B, S), by distance
    band = bell[:, (places[:, None] - places).abs()]
    band = band / band.sum(-1, keepdim=True)
    return band @ images @ band.transpose(1, 2)
