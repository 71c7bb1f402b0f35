"""Plates and labels of samples as arrays: reads .npy files, checks their shape. Must not import networks or losses."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cxrloop import npy
from cxrloop.plate import PLATE_SHAPE
from learner.errors import ManifestError
from learner.round.manifest import Sample


def read_plate(path: Path) -> np.ndarray:
    """Return uint8 [512, 512]. Raises ManifestError for a missing or damaged file and for another shape."""
    try:
        plate = npy.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise ManifestError(f"{path}: not a plate ({error})") from None
    if plate.shape != PLATE_SHAPE or plate.dtype != np.uint8:
        raise ManifestError(f"{path}: {plate.dtype} {list(plate.shape)}; a plate is uint8 {list(PLATE_SHAPE)}")
    return plate


def read_plates(samples: Sequence[Sample]) -> Tensor:
    """Return the plates of these samples, uint8 (B, 512, 512). Raises ManifestError."""
    return torch.from_numpy(np.stack([read_plate(sample.plate) for sample in samples]))


def label_table(samples: Sequence[Sample]) -> Tensor:
    """Return the labels of these samples, float32 (B, F); nan = unknown."""
    return torch.tensor(
        [[float("nan") if label is None else float(label) for label in sample.labels] for sample in samples]
    )
