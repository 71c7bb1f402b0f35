"""Letterbox of an image onto the plate: area average when it shrinks, bilinear when it grows.

Plain arithmetic on one array. Must not import DICOM modules.
"""

from functools import lru_cache

import numpy as np

from cxrloop.plate import PLATE_SIDE


def letterbox(image: np.ndarray, side: int = PLATE_SIDE) -> np.ndarray:
    """Return uint8 [side, side] from float [H, W] in 0..255: same aspect ratio, centred, black borders."""
    rows, columns = image.shape
    scale = side / max(rows, columns)
    height, width = max(1, round(rows * scale)), max(1, round(columns * scale))
    small = _along_rows(_along_rows(image, height).T, width).T
    plate = np.zeros((side, side), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    plate[top : top + height, left : left + width] = np.clip(np.rint(small), 0, 255)
    return plate


def _along_rows(image: np.ndarray, out: int) -> np.ndarray:
    """Return float32 [out, W] from [H, W]; each output row is a weighted sum of a few neighbouring input rows."""
    image = np.ascontiguousarray(image, np.float32)
    if image.shape[0] == out:
        return image
    small = np.empty((out, image.shape[1]), np.float32)
    for row, (start, weights) in enumerate(taps(image.shape[0], out)):
        np.matmul(weights, image[start : start + len(weights)], out=small[row])
    return small


@lru_cache(maxsize=64)  # the detectors of a site have few different sizes
def taps(size: int, out: int) -> tuple[tuple[int, np.ndarray], ...]:
    """Return, for each output sample, its first input sample and float32 weights that sum to 1."""
    samples = []
    for index in range(out):
        if out < size:  # the exact share of every input sample in the interval [low, high)
            low, high = index * size / out, (index + 1) * size / out
            start, stop = int(low), min(int(np.ceil(high - 1e-9)), size)
            edges = np.clip(np.arange(start, stop + 1), low, high)
            weights = np.diff(edges)
        else:  # bilinear at half-pixel centres, clamped at the border
            centre = np.clip((index + 0.5) * size / out - 0.5, 0, size - 1)
            start = min(int(centre), max(size - 2, 0))
            share = centre - start
            weights = np.array([1 - share, share][:size])
        samples.append((start, (weights / weights.sum()).astype(np.float32)))
    return tuple(samples)
