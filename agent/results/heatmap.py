"""Heatmaps: packed for the outbox, and drawn over a plate."""

import io
from collections.abc import Sequence
from math import ceil, sqrt

import numpy as np
from PIL import Image

SIDE = 512  # pixels, as a plate
OPACITY = 0.6  # of the colour where the map is highest


def pack(heatmap: np.ndarray) -> bytes:
    """Return a .npy of uint8 [F, g, g] from float [F, g, g]: the evidence for each finding, over its own maximum."""
    evidence = np.nan_to_num(heatmap).clip(min=0)
    scaled = evidence / np.maximum(evidence.max((1, 2), keepdims=True), np.finfo(np.float32).tiny)
    body = io.BytesIO()
    np.save(body, np.round(scaled * 255).astype(np.uint8), allow_pickle=False)
    return body.getvalue()


def overlay(plate: np.ndarray, heatmap: np.ndarray) -> Image.Image:
    """Return the plate uint8 [512, 512] with a heatmap float [g, g] over it: red where high, clear where low."""
    low, high = float(heatmap.min()), float(heatmap.max())
    scaled = (heatmap - low) / (high - low) if high > low else np.zeros_like(heatmap)
    smooth = Image.fromarray((scaled * 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    alpha = np.asarray(smooth, np.float32)[..., None] / 255 * OPACITY
    grey = np.repeat(plate[..., None].astype(np.float32), 3, axis=2)
    red = np.array([255.0, 48.0, 0.0], np.float32)
    return Image.fromarray((grey * (1 - alpha) + red * alpha).astype(np.uint8))


def sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Return pictures of SIDE x SIDE side by side, in rows of a near-square sheet."""
    columns = ceil(sqrt(len(pictures)))
    whole = Image.new("RGB", (SIDE * columns, SIDE * ceil(len(pictures) / columns)))
    for number, picture in enumerate(pictures):
        whole.paste(picture, (SIDE * (number % columns), SIDE * (number // columns)))
    return whole
