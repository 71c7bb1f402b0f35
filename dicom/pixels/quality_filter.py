"""The quality filter: whether a plate shows a chest, upright and not inverted, judged by its pixels alone.

A small convolutional net in numpy over the plate at 32 x 32, and two rules for saturated and empty plates. The script
tools/quality_filter/train.py made quality.npz. The net cannot detect a lateral view: none was in its training images.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

WEIGHTS = Path(__file__).with_name("quality.npz")
SIDE = 32  # pixels; smaller than any source image, so the net cannot learn the resolution of a data set
CLIPPED = 0.70  # share of pixels that are pure black or white; all 16,000 chest images of three data sets are under .4
FLAT = 4.0  # standard deviation in grey levels at 32 x 32; chest images of three data sets have 18 or more
ROUGH = 0.4  # correlation of neighbours at 32 x 32: noise has less than .15, the roughest chest image .67


@dataclass(frozen=True)
class Prediction:
    """Probabilities by the net. `turned`: rotated by 0, 90, 180 and 270 degrees counter-clockwise."""

    chest: float
    inverted: float
    turned: tuple[float, float, float, float]


def fault(plate: np.ndarray) -> str | None:
    """Return why a plate (uint8 [512, 512]) must not be scored or trained on; None when it passes."""
    share = clipped(plate)
    if share > CLIPPED:
        return f"quality: saturated, {share:.0%} of the image is black or white"
    small = shrink(plate)
    if small.std() < FLAT or _correlation(small) < ROUGH:
        return "quality: nothing but noise on the image"
    return verdict(predict(plate), _net()["limits"])


def verdict(prediction: Prediction, limits: np.ndarray) -> str | None:
    """Return the reason for rejection by the three limits (not a chest, inverted, rotated); None within all of them."""
    if 1 - prediction.chest > limits[0]:
        return f"quality: not a chest image ({1 - prediction.chest:.2f})"
    if prediction.inverted > limits[1]:
        return f"quality: inverted, black for white ({prediction.inverted:.2f})"
    if 1 - prediction.turned[0] > limits[2]:
        quarter = int(np.argmax(prediction.turned[1:])) + 1
        return f"quality: rotated by {90 * quarter} degrees ({1 - prediction.turned[0]:.2f})"
    return None


def predict(plate: np.ndarray, net: dict[str, np.ndarray] | None = None) -> Prediction:
    """Return the prediction for a plate (uint8 [512, 512]), by the shipped weights or those of `net`."""
    net = net or _net()
    values = normal(shrink(plate))[None]  # (channels, rows, columns)
    for layer in range(4):
        values = np.maximum(_convolve(values, net[f"w{layer}"], net[f"b{layer}"], 1 if layer == 0 else 2), 0)
    logits = net["w4"] @ values.ravel() + net["b4"]
    chest, inverted = 1 / (1 + np.exp(-logits[:2].astype(np.float64)))
    turned = np.exp(logits[2:] - logits[2:].max())
    upright, left, over, right = (turned / turned.sum()).tolist()
    return Prediction(float(chest), float(inverted), (upright, left, over, right))


def clipped(plate: np.ndarray) -> float:
    """Return the share of pure black and white pixels, without the black rows and columns at the border."""
    rows, columns = np.flatnonzero(plate.any(1)), np.flatnonzero(plate.any(0))
    if not len(rows):
        return 1.0
    inside = plate[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return float(((inside <= 1) | (inside >= 254)).mean())


def _correlation(small: np.ndarray) -> float:
    """Return the correlation of neighbouring squares, vertical and horizontal; `small` must not be constant."""
    away = small - small.mean()
    return float(((away[1:] * away[:-1]).mean() + (away[:, 1:] * away[:, :-1]).mean()) / 2 / (away * away).mean())


def shrink(plate: np.ndarray) -> np.ndarray:
    """Return float32 [32, 32]: the means of equal squares."""
    block = plate.shape[0] // SIDE
    return plate.reshape(SIDE, block, SIDE, block).mean((1, 3), dtype=np.float32)


def normal(small: np.ndarray) -> np.ndarray:
    """Return float32 like `small`, mean 0; the 8 grey levels keep noise from being amplified."""
    return (small - small.mean()) / (small.std() + 8)


def _convolve(values: np.ndarray, weights: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
    """Return float32 [out, H / stride, W / stride] from [in, H, W]; 3 x 3 kernels, zero padding."""
    padded = np.pad(values, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::stride, ::stride]
    columns = windows.transpose(0, 3, 4, 1, 2).reshape(weights[0].size, -1)
    return (weights.reshape(len(weights), -1) @ columns + bias[:, None]).reshape(len(weights), *windows.shape[1:3])


@lru_cache(maxsize=1)
def _net() -> dict[str, np.ndarray]:
    with np.load(WEIGHTS, allow_pickle=False) as file:
        return {name: file[name].astype(np.float32) for name in file.files}
