"""The images that train and test the quality filter: public sets, split by patient.

Reads DIR/kermany224, DIR/nih1000_64, DIR/mednist_cxr64 (frontal chests) and DIR/mednist_other64 (everything else)
through the plate's own letterbox. Writes a cache only; images and cache are never committed.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.common.public_images import read_set
from dicom.pixels import quality_filter
from dicom.pixels.letterbox import letterbox

SIDE = 64  # pixels, the size of the smallest sets; the net reads half of it
CHESTS = ("kermany224", "nih1000_64", "mednist_cxr64")
OTHERS = "mednist_other64"
KINDS = ("AbdomenCT", "BreastMRI", "ChestCT", "Hand", "HeadCT")
# percent of patients (of images, if a set names no patients) for (validation, test); the rest trains
SHARES = {"kermany224": (12, 12), "nih1000_64": (20, 40), "mednist_cxr64": (10, 20), OTHERS: (15, 35)}


@dataclass(frozen=True)
class Images:
    """Small plates with their facts; all arrays by position."""

    small: np.ndarray  # uint8 [n, 64, 64]
    origin: np.ndarray  # name of the set; for images of other parts, the kind
    patient: np.ndarray
    part: np.ndarray  # "train", "validation", "test"
    chest: np.ndarray  # bool
    clipped: np.ndarray  # share of the plate's image that is pure black or white

    def where(self, mask: np.ndarray) -> "Images":
        """Return the images of a mask."""
        columns = (self.small, self.origin, self.patient, self.part, self.chest, self.clipped)
        return Images(*(column[mask] for column in columns))


def read_images(data: Path, cache: Path) -> Images:
    """Return every image of the four sets; `cache` (.npz) keeps the decoded images."""
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for name in (*CHESTS, OTHERS) for row in _read_set(data, name)]
        small, clipped, origin, patient = (list(column) for column in zip(*rows, strict=True))
        np.savez(cache, small=np.stack(small), clipped=clipped, origin=origin, patient=patient)
    with np.load(cache) as file:
        part = np.array([part_of(patient) for patient in file["patient"]])
        chest = np.isin(file["origin"], CHESTS)
        return Images(file["small"], file["origin"], file["patient"], part, chest, file["clipped"])


def _read_set(data: Path, name: str) -> list[tuple[np.ndarray, float, str, str]]:
    rows = []
    for image in read_set(data / name):
        # Kermany's person numbers restart in each split; an image without a patient counts as a patient of its own
        file = image.picture.relative_to(data / name).as_posix()
        patient = f"{name}/{image.split or '-'}/{image.patient_id or file}"
        plate = letterbox(np.asarray(Image.open(image.picture).convert("L"), np.float32))
        rows.append((small_plate(plate), quality_filter.clipped(plate), image.kind or name, patient))
    return rows


def part_of(patient: str) -> str:
    """Return the part of a patient, from a hash, equal on every machine; Kermany's test images stay test images."""
    name, split, _ = patient.split("/", 2)
    number = int(hashlib.sha256(patient.encode()).hexdigest(), 16) % 100
    validation, test = SHARES[name]
    if split == "test":
        return "test"
    return "validation" if number < validation else "test" if number < validation + test else "train"


def small_plate(plate: np.ndarray) -> np.ndarray:
    """Return the plate's block means, uint8 [64, 64]."""
    block = plate.shape[0] // SIDE
    return np.rint(plate.reshape(SIDE, block, SIDE, block).mean((1, 3))).astype(np.uint8)
