"""The demo's sending PACS: phantom images (or the user's own) as DICOM files, with their true findings.

Must not import `agent.ledger`, `agent.rounds` or `agent.release`.
"""

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from agent.errors import Problem
from dicom.client.sender import send
from dicom.phantom.phantom import draw, hip, lateral
from dicom.phantom.wrap import wrap

EXPLICIT_LE, J2K_LOSSLESS = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.90"
FINDINGS = ("cardiomegaly", "effusion", "opacity")
PREVALENCE = 0.45  # of each finding: enough of both classes in few images; lower in a hospital
REPEAT = 0.15  # probability that an image belongs to the previous patient
STRENGTH = (0.5, 1.3)  # of a finding, mild to severe: learnable for a ViT from random weights with few labels
PICTURES = {".png", ".jpg", ".jpeg"}


@dataclass(frozen=True)
class DemoImage:
    """A DICOM file of the PACS with its true findings; none where labels.csv has no row for it."""

    path: Path
    sop_uid: str
    patient: str
    truth: dict[str, int]


def phantoms(folder: Path, n: int, seed: int) -> tuple[list[DemoImage], list[Path]]:
    """Write `n` frontal phantoms (some MONOCHROME1, some JPEG 2000) and some odd files; return both."""
    folder.mkdir(parents=True)
    images = []
    for number, phantom in enumerate(draw(n, seed, FINDINGS, PREVALENCE, STRENGTH, repeat=REPEAT)):
        dataset = wrap(
            phantom.pixels(),
            patient_id=phantom.patient,
            view=phantom.view,
            sex=phantom.sex,
            age_years=phantom.age_years,
            photometric="MONOCHROME1" if number % 7 == 3 else "MONOCHROME2",
            transfer_syntax=J2K_LOSSLESS if number % 11 == 5 else EXPLICIT_LE,
        )
        path = folder / f"image{number:05d}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        images.append(DemoImage(path, dataset.SOPInstanceUID, phantom.patient, dict(phantom.labels)))
    return images, _odd_files(folder, seed)


def _odd_files(folder: Path, seed: int) -> list[Path]:
    """Write files that a real stream also holds: laterals, a hip, an image without view, half a file."""
    odd = {
        "lateral1": wrap(lateral(seed), patient_id="ODD-1", view="LL"),
        "lateral2": wrap(lateral(seed + 1), patient_id="ODD-2", view="RL"),
        "hip": wrap(hip(seed), patient_id="ODD-3", view="AP", body_part="HIP"),
        "noview": wrap(lateral(seed + 2), patient_id="ODD-4", view=""),
    }
    paths = []
    for name, dataset in odd.items():
        paths.append(folder / f"odd-{name}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    whole = paths[0].read_bytes()
    half = folder / "odd-cut.dcm"
    half.write_bytes(whole[: len(whole) // 2])
    return [*paths, half]


def own(source: Path, folder: Path) -> tuple[list[DemoImage], list[Path]]:
    """Copy the user's own DICOM or PNG/JPEG files; return them with the truth of labels.csv, and the odd files.

    Raises Problem without a labels.csv that has the columns `file`, `finding`, `value`.
    """
    table = source / "labels.csv"
    if not table.is_file():
        raise Problem(f"{table} is missing: columns file, finding, value (1/0), optional patient_id, view, sex, age")
    truth: dict[str, dict[str, int]] = defaultdict(dict)
    facts: dict[str, dict[str, str]] = {}
    with table.open(newline="", encoding="utf-8-sig") as file:
        for row in csv.DictReader(file):
            if {"file", "finding", "value"} - set(row):
                raise Problem(f"{table}: needs the columns file, finding, value")
            facts[row["file"]] = row
            if row["value"] in ("0", "1"):
                truth[row["file"]][row["finding"]] = int(row["value"])
    folder.mkdir(parents=True)
    images, odd = [], []
    for number, path in enumerate(sorted(p for p in source.rglob("*") if p.is_file() and p != table)):
        name = path.relative_to(source).as_posix()
        known = facts.get(name, {})
        target = folder / f"image{number:05d}.dcm"
        try:
            if path.suffix.lower() in PICTURES:
                dataset = wrap(path, known.get("patient_id") or path.stem, known.get("view") or "PA")
            else:
                dataset = dcmread(path)
            dataset.save_as(target, enforce_file_format=True)
            images.append(
                DemoImage(target, dataset.SOPInstanceUID, str(dataset.get("PatientID", name)), truth.get(name, {}))
            )
        except (InvalidDicomError, ValueError, OSError, AttributeError):
            odd.append(path)
    return images, odd


def deliver(paths: Iterable[Path], port: int, aet: str) -> Iterator[tuple[Path, int | None]]:
    """Send each file to the node on loopback; yield it with its C-STORE status, None when it could not be sent."""
    for item, status in send(list(paths), "127.0.0.1", port, aet, calling_aet="DEMO_PACS"):
        if isinstance(item, Path):
            yield item, status


def in_days(images: list[DemoImage], later: int, daily: int, seed: int) -> list[list[DemoImage]]:
    """Split images into the archive of the first day and `later` days of about `daily` images, by patient."""
    patients = sorted({image.patient for image in images})
    np.random.default_rng(seed).shuffle(patients)
    per_patient = len(images) / max(1, len(patients))
    size = round(daily / per_patient)
    archive = len(patients) - later * size
    day_of = {patient: max(0, 1 + (place - archive) // max(1, size)) for place, patient in enumerate(patients)}
    return [[image for image in images if min(day_of[image.patient], later) == day] for day in range(later + 1)]
