"""Resizing and pooling as matrix products: plates to images, and tokens or simple features to one vector an image."""

from math import isqrt

import torch
from torch import Tensor

CELLS = 4  # rows and columns of the grid of pool "grid"
WIDTHS = {"cls": 1, "mean": 1, "both": 2, "grid": CELLS * CELLS // 2}  # width of the embedding, in widths of a token


def resize_matrix(old: int, new: int) -> Tensor:
    """Return R (new, old): R @ x @ R.T is the antialiased bilinear resize of x (old, old); rows sum to 1."""
    scale = old / new
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * scale - 0.5
    distance = (torch.arange(old, dtype=torch.float64)[None] - centres[:, None]).abs() / max(scale, 1.0)
    rows = (1 - distance).clamp(min=0)
    return (rows / rows.sum(1, keepdim=True)).float()


def cell_weights(side: int, cells: int) -> Tensor:
    """Return (cells, side): row i takes the mean of positions floor(i side / cells) to ceil((i + 1) side / cells)."""
    positions = torch.arange(side)
    first = torch.arange(cells) * side // cells
    last = -(-(torch.arange(cells) + 1) * side // cells)
    inside = (positions >= first[:, None]) & (positions < last[:, None])
    return inside.float() / inside.sum(1, keepdim=True)


def cell_means(features: Tensor, cells: int = CELLS) -> Tensor:
    """Return the mean of each cell, (B, C, cells, cells), of features (B, C, h, w)."""
    down = cell_weights(features.shape[-2], cells).to(features)
    across = cell_weights(features.shape[-1], cells).to(features)
    return down @ features @ across.T


def spread_weights(old: int, new: int) -> Tensor:
    """Return R (new, old), whose columns sum to 1: R @ x @ R.T is a map x (old, old) on another grid, with the same sum."""
    weights = cell_weights(old, new)
    return weights / weights.sum(0)


def mirrored_cell_weights(high: int, wide: int) -> Tensor:
    """Return (CELLS * CELLS / 2, high wide): weights of the patches in each cell together with its mirror image.

    Left and right share a cell, because few labels cannot teach a linear head that both lungs get the same findings.
    """
    cells = cell_weights(high, CELLS)[:, None, :, None] * cell_weights(wide, CELLS)[None, :, None, :]
    half = (cells + cells.flip(1))[:, : CELLS // 2] / 2
    return half.reshape(-1, high * wide)


def pool_tokens(tokens: Tensor, pool: str, prefix: int, cells: Tensor | None = None) -> Tensor:
    """Return embeddings (B, WIDTHS[pool] D) of tokens (B, prefix + h w, D) after the last norm; h = w for "grid".

    cells: `mirrored_cell_weights` of the usual h and w, so that an exported graph holds them as a constant.
    """
    if pool == "cls":
        return tokens[:, 0]
    patches = tokens[:, prefix:]
    if pool == "grid":
        return (_cells_of(patches, cells) @ patches).flatten(1)
    mean = patches.mean(1)
    return mean if pool == "mean" else torch.cat([tokens[:, 0], mean], 1)


def _cells_of(patches: Tensor, cells: Tensor | None) -> Tensor:
    """Return `cells` where they fit the number of patches, else those of a square grid."""
    if cells is not None and cells.shape[1] == patches.shape[1]:
        return cells.to(patches.dtype)
    side = isqrt(patches.shape[1])
    return mirrored_cell_weights(side, side).to(patches)


def patch_contributions(patches: Tensor, directions: Tensor, pool: str, cells: Tensor | None = None) -> Tensor:
    """Return what each patch adds to the embedding along directions (B, F, D'), (B, F, h w); pools "mean" and "grid".

    patches (B, h w, D) after the last norm. The sum over patches is directions . embedding.
    """
    if pool == "mean":
        return directions @ patches.transpose(1, 2) / patches.shape[1]
    weights = _cells_of(patches, cells)
    by_cell = directions.unflatten(-1, (len(weights), -1)) @ patches.transpose(1, 2)[:, None]  # (B, F, cells, h w)
    return (by_cell * weights).sum(2)
