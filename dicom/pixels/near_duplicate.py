"""Codes that find near-duplicates: two plates of one image, resent with noise, compression or a small shift, are close.

A code is the signs of random projections of the plate's local contrast, so the share of differing bits estimates the
angle between two plates (Charikar, STOC 2002). The projections come from a key: a sender can't compute a code.
bench/nights/pool_study.py measures LIMIT. Must not import DICOM modules.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

from cxrloop.plate import PLATE_SIDE

SIDE = 32  # of the area means: 16 pixels a block, about half the width of a rib
WIDTH = 2.0  # blocks; standard deviation of the Gaussian window in which contrast is normalised
LEAST = 4.0  # grey levels; added to the window's deviation, so that noise in flat areas stays small
BORDER = 2  # blocks left out on each side: collimator edges and letterbox borders are the same in many images
BITS = 512
BAND_BITS, BANDS = 16, 20  # two codes share a band with 99.99 % at 5 % differing bits, 98 % at 10 %
LIMIT = 80  # differing bits, at most, of near-duplicates: 16 %, a cosine of .88


def descriptor(plate: np.ndarray) -> np.ndarray:
    """Return the local contrast of a plate, uint8 [512, 512], as a vector of length 1, float32 [784]."""
    block = PLATE_SIDE // SIDE
    means = plate.astype(np.float32).reshape(SIDE, block, SIDE, block).mean((1, 3))
    window = _window()
    contrast = means - window @ means @ window.T
    contrast /= np.sqrt(window @ contrast**2 @ window.T) + LEAST
    vector = contrast[BORDER:-BORDER, BORDER:-BORDER].ravel()
    return vector / max(float(np.linalg.norm(vector)), 1e-6)


def code(plate: np.ndarray, key: bytes) -> bytes:
    """Return the code of a plate, uint8 [512, 512], under a key: 64 bytes."""
    return np.packbits(descriptor(plate) @ _projections(key) > 0).tobytes()


def distance(first: bytes, second: bytes) -> int:
    """Return the number of bits in which two codes differ."""
    return (int.from_bytes(first) ^ int.from_bytes(second)).bit_count()


def bands(code: bytes) -> list[int]:
    """Return the numbers under which a code is found: its first BANDS pieces of BAND_BITS bits, each with its place."""
    size = BAND_BITS // 8
    return [place << BAND_BITS | int.from_bytes(code[place * size : (place + 1) * size]) for place in range(BANDS)]


@lru_cache(maxsize=1)
def _window() -> np.ndarray:
    """Return the matrix of the Gaussian window, float32 [SIDE, SIDE]; each row sums to 1."""
    apart = np.arange(SIDE)[:, None] - np.arange(SIDE)[None, :]
    weights = np.exp(-(apart**2) / (2 * WIDTH**2))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


@lru_cache(maxsize=2)
def _projections(key: bytes) -> np.ndarray:
    """Return the projections of a key, float32 [784, BITS] of -1 and 1. SHAKE-256: the same on every version of numpy."""
    length = (SIDE - 2 * BORDER) ** 2
    random = hashlib.shake_256(b"cxrloop near-duplicates" + key).digest(length * BITS // 8)
    signs = np.unpackbits(np.frombuffer(random, np.uint8)).astype(np.float32)
    return (2 * signs - 1).reshape(length, BITS)
