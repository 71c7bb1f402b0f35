"""The shipped quality filter on inputs it was not trained on: real DICOM files and drawings; and its time.

Reads a folder of DICOM files with a manifest.csv (file, kind, expect).
"""

import csv
import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from pydicom import dcmread

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dicom.intake.examine import Admission, examine
from dicom.phantom import phantom
from dicom.phantom.wrap import wrap
from dicom.pixels import quality_filter
from dicom.pixels.plate import to_plate


def drawings(seed: int, count: int = 200) -> dict[str, float]:
    """Return the share of new phantom images that are rejected, by kind; demo and heartbeat use such images."""
    chests = [image.pixels() for image in phantom.draw(count, seed + 90_000)]
    images = {
        "phantom chest": chests,
        "phantom chest, 96 px": [image.pixels(96) for image in phantom.draw(count, seed + 91_000)],
        "phantom chest, inverted": [phantom.TOP - pixels for pixels in chests],
        **{f"phantom chest, rotated {90 * k}": [np.rot90(pixels, k) for pixels in chests] for k in (1, 2, 3)},
        "drawn pelvis": [phantom.hip(seed + 90_000 + i) for i in range(count)],
        "drawn lateral": [phantom.lateral(seed + 90_000 + i) for i in range(count)],
    }
    return {
        name: round(sum(quality_filter.fault(to_plate(wrap(pixels, "P1"))) is not None for pixels in made) / count, 3)
        for name, made in images.items()
    }


def times(small: np.ndarray) -> dict[str, float]:
    """Return median and 95th percentile of `quality_filter.fault` on one plate, ms on one thread."""
    plates = [np.kron(image, np.ones((8, 8), np.uint8)) for image in small[:200]]
    taken = []
    for plate in plates:
        began = time.perf_counter()
        quality_filter.fault(plate)
        taken.append((time.perf_counter() - began) * 1000)
    return {"median": round(float(np.median(taken)), 2), "p95": round(float(np.quantile(taken, 0.95)), 2)}


def real_images(folder: Path) -> list[dict]:
    """Return for each file the outcome of admission with and without the filter, and of the filter alone."""
    rows = []
    warnings.simplefilter("ignore")
    with (folder / "manifest.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            path = folder / row["file"]
            plain, judged = (examine(path, b"k" * 32, Admission(children=True, quality=on)) for on in (False, True))
            try:
                pixels = quality_filter.fault(to_plate(dcmread(path))) or "passes"
            except Exception as error:  # noqa: BLE001 (the folder holds hostile files)
                pixels = f"no plate: {type(error).__name__}"
            agrees = row["expect"] == "either" or (judged.outcome == "admitted") == (row["expect"] == "admitted")
            rows.append(
                {
                    "file": row["file"],
                    "expected": row["expect"],
                    "without": plain.outcome,
                    "with": judged.outcome,
                    "reason": judged.reason,
                    "pixels": pixels,
                    "as_expected": agrees,
                }
            )
    wrong = [row for row in rows if not row["as_expected"]]
    print(f"\nreal DICOM files: {len(rows)}, as expected {len(rows) - len(wrong)}", json.dumps(wrong))
    for row in rows:
        print(f"{row['file']:46}{row['expected']:14}{row['with']:12}{row['pixels']}")
    return rows
