"""The demo's sending PACS: phantom images (or the user's own) as DICOM files with the truth beside them.

It knows the truth and the wire; it knows nothing of ledger, ranges or models.
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
PREVALENCE = 0.45  # enough of both classes on few images; a hospital's is lower
STRENGTH = (0.5, 1.3)  # from plain to gross: a ViT from random weights and few labels must have a chance
PICTURES = {".png", ".jpg", ".jpeg"}


@dataclass(frozen=True)
class Image:
    """A DICOM file of the PACS and what is true of it; no truth for what is no frontal chest image."""

    path: Path
    sop_uid: str
    patient: str
    truth: dict[str, int]


def phantoms(folder: Path, n: int, seed: int) -> tuple[list[Image], list[Path]]:
    """`n` frontal phantoms as DICOM in `folder` (some MONOCHROME1, some JPEG 2000), and the odd ones that come between."""
    folder.mkdir(parents=True)
    images = []
    for number, phantom in enumerate(draw(n, seed, FINDINGS, PREVALENCE, STRENGTH, repeat=0.15)):
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
        images.append(Image(path, dataset.SOPInstanceUID, phantom.patient, dict(phantom.labels)))
    return images, _odd_ones(folder, seed)


def _odd_ones(folder: Path, seed: int) -> list[Path]:
    """What a real stream also brings: laterals, a hip, a file cut in half, one that is noise."""
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
    corrupt = folder / "odd-cut.dcm"
    corrupt.write_bytes(whole[: len(whole) // 2])
    return [*paths, corrupt]


def own(source: Path, folder: Path) -> tuple[list[Image], list[Path]]:
    """The user's own DICOM or PNG/JPEG with labels.csv (`file`, `finding`, `value`); raises Problem without labels."""
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
                Image(target, dataset.SOPInstanceUID, str(dataset.get("PatientID", name)), truth.get(name, {}))
            )
        except (InvalidDicomError, ValueError, OSError, AttributeError):
            odd.append(path)
    return images, odd


def deliver(paths: Iterable[Path], port: int, aet: str) -> Iterator[tuple[Path, int | None]]:
    """C-STORE each file to the node on loopback; its status, None for what could not be sent."""
    for item, status in send(list(paths), "127.0.0.1", port, aet, calling_aet="DEMO_PACS"):
        if isinstance(item, Path):
            yield item, status


def in_days(images: list[Image], later: int, daily: int, seed: int) -> list[list[Image]]:
    """The archive of the first day, then `later` days of about `daily` images; a patient's images come on one day."""
    patients = sorted({image.patient for image in images})
    np.random.default_rng(seed).shuffle(patients)
    per_patient = len(images) / max(1, len(patients))
    size = round(daily / per_patient)
    archive = len(patients) - later * size
    day_of = {patient: max(0, 1 + (place - archive) // max(1, size)) for place, patient in enumerate(patients)}
    return [[image for image in images if min(day_of[image.patient], later) == day] for day in range(later + 1)]
