"""Network inputs from plates, and DISTL's random views, as batched tensor operations on any device.

Resizing, cropping and blurring are matrix products `R @ x @ R.T`. The exported model uses the same `learner.networks.pooling.resize_matrix`, so
training and serving see the same pixels. Must not draw random numbers: a view depends only on its image and the uniform
numbers that the caller passes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

from learner.round.recipe import Recipe

TRIES = 10  # draws of area and aspect ratio before a crop is the whole image, as in torchvision's RandomResizedCrop
NUMBERS_PER_VIEW = 2 * TRIES + 8  # uniform numbers
ASPECT = (log(3 / 4), log(4 / 3))
BLUR = (0.1, 2.0)  # sigma in pixels


def to_image(plates: Tensor, matrix: Tensor) -> Tensor:
    """Return plates, uint8 (B, 512, 512), as images (B, 1, S, S) in [0, 1]; matrix (S, 512) of `resize_matrix`."""
    grey = plates.to(matrix.dtype) / 255
    return (matrix @ grey @ matrix.T)[:, None]


def normalise(images: Tensor, recipe: Recipe) -> Tensor:
    """Return images in [0, 1], less the recipe's mean and divided by its std."""
    return (images - recipe.mean) / recipe.std


@dataclass(frozen=True)
class Augmentation:
    """Size and strength of the augmentation of one kind of view."""

    size: int  # pixels a side
    scale: tuple[float, float]  # smallest and largest area of a crop, as a share of the image
    rotate: float  # largest rotation, degrees
    probability: float  # of each of autocontrast, equalise and blur
    flip: bool


def make_views(images: Tensor, numbers: Tensor, recipe: Recipe) -> list[Tensor]:
    """Return normalised views, each (B, 1, s, s): the unaugmented image, one augmented global view, the local views.

    images (B, 1, S, S); numbers (B, views - 1, NUMBERS_PER_VIEW) in host memory, so that choices need no wait for a GPU.
    """
    whole = Augmentation(recipe.image_size, recipe.global_scale, recipe.rotate, recipe.global_noise, recipe.flip)
    part = Augmentation(recipe.local_size, recipe.local_scale, recipe.rotate, recipe.local_noise, recipe.flip)
    kinds = ((numbers[:, :1], whole), (numbers[:, 1:], part))
    augmented = [augmented_views(images, drawn, kind) for drawn, kind in kinds if drawn.numel()]
    return [normalise(view, recipe) for view in [images, *(view for views in augmented for view in views)]]


def augmented_views(images: Tensor, numbers: Tensor, augmentation: Augmentation) -> Tensor:
    """Return V random views of each image, (V, B, 1, s, s): crop, flip, rotate, autocontrast, equalise, blur, as published.

    images (B, 1, S, S), numbers (B, V, NUMBERS_PER_VIEW). Each operation runs once for all views; the last three only for
    the views that their numbers choose.
    """
    batch, views = numbers.shape[:2]
    flat, side = numbers.flatten(0, 1), images.shape[-1]
    flip, angle, auto, equal, blurred, sigma = flat[:, 2 * TRIES + 2 :].unbind(1)
    settings = [*crop_boxes(flat, side, augmentation.scale), (2 * angle - 1) * augmentation.rotate]
    settings.append(BLUR[0] + sigma * (BLUR[1] - BLUR[0]))
    top, left, high, wide, degrees, width = torch.stack(settings).to(images.device).unbind()
    down = crop_matrix(top, high, side, augmentation.size)  # (B V, s, S)
    across = crop_matrix(left, wide, side, augmentation.size)
    # the V matrices of an image are stacked, so that the image itself is not copied V times
    rows = (down.view(batch, views * augmentation.size, side) @ images[:, 0]).view_as(down)
    out = (rows @ across.transpose(1, 2)).clamp(0, 1)
    if augmentation.flip:
        out = apply_where(out, flip < 0.5, lambda chosen, _: chosen.flip(-1))
    out = rotate(out, degrees)
    out = apply_where(out, auto < augmentation.probability, lambda chosen, _: autocontrast(chosen))
    out = apply_where(out, equal < augmentation.probability, lambda chosen, _: equalise(chosen))
    out = apply_where(out, blurred < augmentation.probability, lambda chosen, which: blur(chosen, width[which]))
    return out.unflatten(0, (batch, views)).transpose(0, 1)[:, :, None]


def apply_where(images: Tensor, chosen: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return images (N, s, s) with `change(images[i], i)` applied to the chosen ones i; chosen (N,) bool, in host memory."""
    which = chosen.nonzero()[:, 0].to(images.device)
    return images.index_copy(0, which, change(images[which], which)) if len(which) else images


def crop_boxes(numbers: Tensor, side: int, scale: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return top, left, height and width in whole pixels, each (B,): the first of TRIES draws that fits the image.

    numbers (B, NUMBERS_PER_VIEW); as torchvision's RandomResizedCrop.
    """
    area = side * side * (scale[0] + numbers[:, :TRIES] * (scale[1] - scale[0]))
    aspect = (ASPECT[0] + numbers[:, TRIES : 2 * TRIES] * (ASPECT[1] - ASPECT[0])).exp()
    wide, high = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (wide <= side) & (high <= side) & (wide > 0) & (high > 0)
    first = fits.int().argmax(1, keepdim=True)
    any_fits = fits.any(1)
    wide = torch.where(any_fits, wide.gather(1, first)[:, 0], float(side))
    high = torch.where(any_fits, high.gather(1, first)[:, 0], float(side))
    top = (numbers[:, 2 * TRIES] * (side - high + 1)).floor()
    left = (numbers[:, 2 * TRIES + 1] * (side - wide + 1)).floor()
    return top, left, high, wide


def crop_matrix(start: Tensor, length: Tensor, old: int, new: int) -> Tensor:
    """Return (B, new, old): crop [start, start + length) and resize it to `new`; antialiased bicubic, a = -.5, as PIL."""
    scale = (length / new)[:, None, None]
    pixels = torch.arange(old, device=start.device, dtype=start.dtype)[None, None]
    targets = torch.arange(new, device=start.device, dtype=start.dtype)[None, :, None]
    first, last = start[:, None, None], (start + length)[:, None, None]
    x = ((pixels - (first + (targets + 0.5) * scale - 0.5)) / scale.clamp(min=1)).abs()
    x = x.clamp(max=2)  # `far` is 0 at 2
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    rows = torch.where(x < 1, near, far) * ((pixels >= first) & (pixels < last))
    return rows / rows.sum(-1, keepdim=True)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Return images (B, S, S) rotated about their centre by degrees (B,); bilinear, 0 outside."""
    angle = torch.deg2rad(degrees)
    zero = torch.zeros_like(angle)
    turn = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(turn, [len(images), 1, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]


def autocontrast(images: Tensor) -> Tensor:
    """Return each image (B, S, S) stretched to [0, 1]; constant images unchanged."""
    low, high = images.amin((1, 2), keepdim=True), images.amax((1, 2), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-12), images)


def equalise(images: Tensor) -> Tensor:
    """Return the histogram equalisation of images (B, S, S) over 256 levels, rounded as in PIL."""
    levels = (images * 255).round().long().flatten(1)
    counts = torch.zeros(len(images), 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels))
    top = 255 - (counts.flip(1) > 0).int().argmax(1, keepdim=True)  # brightest level of the image
    step = (counts.sum(1, keepdim=True) - counts.gather(1, top)) // 255
    table = (counts.cumsum(1) - counts + step // 2) // step.clamp(min=1)
    even = table.clamp(0, 255).gather(1, levels).to(images.dtype).view_as(images) / 255
    return torch.where((step > 0)[:, :, None], even, images)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Return images (B, S, S) with Gaussian blur of sigma (B,) pixels; rows of the blur matrix sum to 1."""
    distance = torch.arange(images.shape[-1], device=images.device)
    bell = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)  # (B, S)
    band = bell[:, (distance[:, None] - distance).abs()]
    band = band / band.sum(-1, keepdim=True)
    return band @ images @ band.transpose(1, 2)
