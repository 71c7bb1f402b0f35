"""Readers of the public chest X-ray sets: a folder for each set, with manifest.csv and the pictures that it names.

Sets: kermany224 (children), nih1000_64 and nih_adult512 (adults), mednist_cxr64 (adults, no labels), mednist_other64 (no chest images).
Columns: file, and where known patient_id, labels (joined by |, empty = unknown), view, split, kind, boxes.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cxrloop.plate import PLATE_SHAPE


@dataclass(frozen=True)
class PublicImage:
    """One row of a manifest; text that the manifest lacks is empty."""

    picture: Path
    patient_id: str
    labels: tuple[str, ...]  # empty = unknown
    view: str
    split: str
    kind: str
    boxes: str = ""  # finding:x:y:w:h in pixels of the original, joined by |

    @property
    def patient(self) -> str:
        """The patient with the split: Kermany's person numbers restart in each split."""
        return f"{self.split}-{self.patient_id}"

    @property
    def abnormal(self) -> int:
        """1 for any finding, 0 for "No Finding", -1 for unknown."""
        return int(self.labels != ("No Finding",)) if self.labels else -1

    def has(self, finding: str) -> int:
        """Return 1 if the labels name the finding, else 0."""
        return int(finding in self.labels)


def read_set(folder: Path) -> list[PublicImage]:
    """Return every image of a set, in the order of its manifest."""
    with (folder / "manifest.csv").open(newline="") as file:
        return [
            PublicImage(
                picture=folder / row["file"],
                patient_id=row.get("patient_id", ""),
                labels=tuple(filter(None, row.get("labels", "").split("|"))),
                view=row.get("view", ""),
                split=row.get("split", ""),
                kind=row.get("kind", ""),
                boxes=row.get("boxes", ""),
            )
            for row in csv.DictReader(file)
        ]


def read_plate(picture: Path, side: int | None = None) -> np.ndarray:
    """Return a picture as a plate, uint8 [512, 512]: shrunk to `side` pixels first if given, letterboxed, enlarged."""
    grey = Image.open(picture).convert("L")
    if side:
        grey.thumbnail((side, side), Image.Resampling.BOX)
    scale = min(PLATE_SHAPE[0] / grey.height, PLATE_SHAPE[1] / grey.width)
    sized = grey.resize((round(grey.width * scale), round(grey.height * scale)), Image.Resampling.BILINEAR)
    plate = Image.new("L", PLATE_SHAPE[::-1])
    plate.paste(sized, ((plate.width - sized.width) // 2, (plate.height - sized.height) // 2))
    return np.asarray(plate, np.uint8)
