"""Is this plate a frontal chest image, upright, not inverted, with something on it? From pixels alone.

A small convolutional net in numpy over the plate at 32 x 32 (tools/quality_filter/train.py made quality.npz and the figures),
and two plain rules for what is saturated or empty. Knows no header, and can't tell a lateral: its images held none.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

WEIGHTS = Path(__file__).with_name("quality.npz")
SIDE = 32  # pixels; every source image has more, so that no set's own resolution survives
CLIPPED = (
    0.70  # share of the image that is pure black or pure white; all 16,000 chest images of three sets are under .4
)
FLAT = 4.0  # grey levels, standard deviation at 32 x 32; chest images of three sets have 18 and more
ROUGH = 0.4  # correlation of neighbours at 32 x 32: noise has less than .15, the roughest chest image .67


@dataclass(frozen=True)
class Prediction:
    """What the net says, each 0..1. `turned` is the chance of 0, 90, 180 and 270 degrees counter-clockwise."""

    chest: float
    inverted: float
    turned: tuple[float, float, float, float]


def fault(plate: np.ndarray) -> str | None:
    """Why a plate (uint8 [512, 512]) is not to be scored or learnt from; None when nothing speaks against it."""
    share = clipped(plate)
    if share > CLIPPED:
        return f"quality: saturated, {share:.0%} of the image is black or white"
    small = shrink(plate)
    if small.std() < FLAT or _likeness(small) < ROUGH:
        return "quality: nothing but noise on the image"
    return verdict(predict(plate), _net()["limits"])


def verdict(said: Prediction, limits: np.ndarray) -> str | None:
    """The reason that an answer is, by the limits for not a chest, inverted and rotated; None within all three."""
    if 1 - said.chest > limits[0]:
        return f"quality: not a chest image ({1 - said.chest:.2f})"
    if said.inverted > limits[1]:
        return f"quality: inverted, black for white ({said.inverted:.2f})"
    if 1 - said.turned[0] > limits[2]:
        quarter = int(np.argmax(said.turned[1:])) + 1
        return f"quality: rotated by {90 * quarter} degrees ({1 - said.turned[0]:.2f})"
    return None


def predict(plate: np.ndarray, net: dict[str, np.ndarray] | None = None) -> Prediction:
    """What the net (ours, or one under trial) says of a plate, uint8 [512, 512]."""
    net = net or _net()
    values = normal(shrink(plate))[None]  # (channels, rows, columns)
    for layer in range(4):
        values = np.maximum(_convolve(values, net[f"w{layer}"], net[f"b{layer}"], 1 if layer == 0 else 2), 0)
    logits = net["w4"] @ values.ravel() + net["b4"]
    chest, inverted = 1 / (1 + np.exp(-logits[:2].astype(np.float64)))
    turned = np.exp(logits[2:] - logits[2:].max())
    one, two, three, four = (turned / turned.sum()).tolist()
    return Prediction(float(chest), float(inverted), (one, two, three, four))


def clipped(plate: np.ndarray) -> float:
    """Share of pure black and white on the image, the outermost all-black rows and columns (letterbox, shutters) aside."""
    rows, columns = np.flatnonzero(plate.any(1)), np.flatnonzero(plate.any(0))
    if not len(rows):
        return 1.0
    inside = plate[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return float(((inside <= 1) | (inside >= 254)).mean())


def _likeness(small: np.ndarray) -> float:
    """Correlation of squares that touch, above and beside; `small` is not flat."""
    away = small - small.mean()
    return float(((away[1:] * away[:-1]).mean() + (away[:, 1:] * away[:, :-1]).mean()) / 2 / (away * away).mean())


def shrink(plate: np.ndarray) -> np.ndarray:
    """float32 [32, 32]: the means of equal squares."""
    block = plate.shape[0] // SIDE
    return plate.reshape(SIDE, block, SIDE, block).mean((1, 3), dtype=np.float32)


def normal(small: np.ndarray) -> np.ndarray:
    """float32 like `small`, mean 0; the 8 grey levels keep noise from being blown up."""
    return (small - small.mean()) / (small.std() + 8)


def _convolve(values: np.ndarray, weights: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
    """float32 [out, H / stride, W / stride] from [in, H, W]; 3 x 3 kernels, zeros around."""
    padded = np.pad(values, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::stride, ::stride]
    columns = windows.transpose(0, 3, 4, 1, 2).reshape(weights[0].size, -1)
    return (weights.reshape(len(weights), -1) @ columns + bias[:, None]).reshape(len(weights), *windows.shape[1:3])


@lru_cache(maxsize=1)
def _net() -> dict[str, np.ndarray]:
    with np.load(WEIGHTS, allow_pickle=False) as file:
        return {name: file[name].astype(np.float32) for name in file.files}
