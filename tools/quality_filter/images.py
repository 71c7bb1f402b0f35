"""The images that the quality filter is trained and judged on: public sets from their folders, split by patient.

Reads DIR/kermany224, DIR/nih1000_64, DIR/mednist_cxr64 (frontal chests) and DIR/mednist_other64 (everything else), each
a manifest.csv with its images, through the plate's own letterbox. Writes nothing but a cache; nothing of it is committed.
"""

import csv
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dicom.pixels import quality_filter
from dicom.pixels.letterbox import letterbox

SIDE = 64  # pixels kept of a plate: what the smallest sets have; the net sees half of it
CHESTS = ("kermany224", "nih1000_64", "mednist_cxr64")
OTHERS = "mednist_other64"
KINDS = ("AbdomenCT", "BreastMRI", "ChestCT", "Hand", "HeadCT")
# of every hundred patients (or images, where a set names no patients): validation, then test; the rest trains
SHARES = {"kermany224": (12, 12), "nih1000_64": (20, 40), "mednist_cxr64": (10, 20), OTHERS: (15, 35)}


@dataclass(frozen=True)
class Images:
    """Small plates and what is known of them, all by position."""

    small: np.ndarray  # uint8 [n, 64, 64]
    origin: np.ndarray  # name of the set, or of the kind for what is no chest
    patient: np.ndarray
    part: np.ndarray  # "train", "validation", "test"
    chest: np.ndarray  # bool
    clipped: np.ndarray  # share of the plate's image that is pure black or white

    def where(self, mask: np.ndarray) -> "Images":
        columns = (self.small, self.origin, self.patient, self.part, self.chest, self.clipped)
        return Images(*(column[mask] for column in columns))


def read_images(data: Path, cache: Path) -> Images:
    """Every image of the four sets; decoded once into `cache` (.npz)."""
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
    found = []
    with (data / name / "manifest.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            # Kermany's person numbers start anew in each split; images without a patient stand for themselves
            patient = f"{name}/{row.get('split') or '-'}/{row.get('patient_id') or row['file']}"
            plate = letterbox(np.asarray(Image.open(data / name / row["file"]).convert("L"), np.float32))
            found.append((small_plate(plate), quality_filter.clipped(plate), row.get("kind") or name, patient))
    return found


def part_of(patient: str) -> str:
    """The same part for the same patient, on every machine; Kermany's own test images stay test images."""
    name, split, _ = patient.split("/", 2)
    number = int(hashlib.sha256(patient.encode()).hexdigest(), 16) % 100
    validation, test = SHARES[name]
    if split == "test":
        return "test"
    return "validation" if number < validation else "test" if number < validation + test else "train"


def small_plate(plate: np.ndarray) -> np.ndarray:
    """uint8 [64, 64]: the plate's block means."""
    block = plate.shape[0] // SIDE
    return np.rint(plate.reshape(SIDE, block, SIDE, block).mean((1, 3))).astype(np.uint8)
