"""The images of the real-input run: which Kermany images are chosen, how they are wrapped, and copies under new UIDs.

It knows the public set's manifest and the site's key; it refuses to know the network and the appliance's answers.
"""

from __future__ import annotations

import csv
import io
import random
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from agent.site.config import PatientKeys
from agent.site.splits import range_of
from dicom.dataset.part10 import DEFLATED_LE, Unreadable, open_envelope
from dicom.phantom.wrap import wrap
from dicom.pseudonyms import patient_key

FINDING = "Pneumonia"
LABELLED = 10  # one training image in so many has its label


@dataclass(frozen=True)
class Image:
    """One Kermany image: its picture, patient (the split kept in the id), truth, and the range its patient falls in."""

    picture: Path
    patient: str
    truth: int
    range: str


def kermany(folder: Path, key: bytes, shares: PatientKeys) -> list[Image]:
    """Every image of the manifest with its patient's range under the site's key."""
    images = []
    with (folder / "manifest.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            patient = f"{row['split']}-{row['patient_id']}"
            pseudonym, identified = patient_key(key, patient, "", "")
            truth = int(FINDING in row["labels"].split("|"))
            where = range_of(key, pseudonym, identified, shares)
            images.append(Image(folder / row["file"], patient, truth, where))
    return images


def choose(images: list[Image], total: int, golden: int, seed: int) -> list[Image]:
    """`total` images: `golden` of the golden range, one of every patient there first, and the rest from the others.

    The golden share is larger than a site's stream would have: 400 in 1,500 where the patients' hash gives a tenth.
    """
    draw = random.Random(seed)
    by_patient: dict[str, list[Image]] = defaultdict(list)
    others = []
    for image in images:
        if image.range == "golden":
            by_patient[image.patient].append(image)
        else:
            others.append(image)
    for mine in by_patient.values():
        draw.shuffle(mine)
    firsts = [mine[0] for mine in by_patient.values()]
    seconds = [image for mine in by_patient.values() for image in mine[1:]]
    for part in (firsts, seconds, others):
        draw.shuffle(part)
    chosen = [*firsts, *seconds][:golden]
    chosen += others[: total - len(chosen)]
    draw.shuffle(chosen)  # ranges arrive mixed, as they would
    return chosen


def composition(images: list[Image]) -> dict[str, dict[str, int]]:
    """Images, patients, and patients of each class, by range."""
    table = {}
    for name in sorted({image.range for image in images}):
        here = [image for image in images if image.range == name]
        classes = Counter(dict.fromkeys((image.patient, image.truth) for image in here))
        table[name] = {
            "images": len(here),
            "patients": len({image.patient for image in here}),
            "patients_with": sum(truth for _, truth in classes),
            "patients_without": sum(1 - truth for _, truth in classes),
        }
    return table


def wrap_all(images: list[Image], folder: Path) -> dict[Path, tuple[str, Image]]:
    """Each image as a DX DICOM file in `folder`, by the product's wrapper: file -> (SOP Instance UID, image)."""
    folder.mkdir(parents=True)
    made = {}
    for number, image in enumerate(images):
        dataset = wrap(image.picture, image.patient, "AP")
        path = folder / f"image{number:05d}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        made[path] = (str(dataset.SOPInstanceUID), image)
    return made


def write_labels(made: dict[Path, tuple[str, Image]], table: Path, seed: int) -> dict[str, int]:
    """A CSV with the labels of a tenth of the training range and of all images of golden, calibration, validation."""
    draw = random.Random(seed)
    by_range: dict[str, list[tuple[str, Image]]] = defaultdict(list)
    for uid, image in made.values():
        by_range[image.range].append((uid, image))
    train = sorted(by_range["train"])
    draw.shuffle(train)
    told = {"train": train[: max(1, round(len(train) / LABELLED))]}
    told |= {name: by_range[name] for name in ("golden", "calibration", "validation")}
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("sop_uid", "finding", "value", "source", "by"))
        for rows in told.values():
            writer.writerows((uid, FINDING, image.truth, "report", "data set") for uid, image in rows)
    return {name: len(rows) for name, rows in told.items()}


def under_new_uid(source: Path, target: Path, number: int) -> str | None:
    """Copy a file with another SOP Instance UID of the same length, every other byte as it was; the new UID.

    None, and a plain copy, where no UID can be read. A deflated data set is inflated and deflated again.
    """
    whole = source.read_bytes()
    target.parent.mkdir(parents=True, exist_ok=True)
    uids = _uids(whole)
    if not uids:
        target.write_bytes(whole)
        return None
    head, body, deflated = _opened(whole)
    for place, old in enumerate(uids):
        new = f"2.25.9{number:04d}{place}".encode().ljust(len(old), b"7")
        head, body = head.replace(old, new), body.replace(old, new)
    if deflated:
        packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        body = packer.compress(body) + packer.flush()
        body += b"\0" * (len(body) % 2)
    target.write_bytes(head + body)
    return f"2.25.9{number:04d}0".ljust(len(uids[0]), "7")


def _uids(whole: bytes) -> list[bytes]:
    """The data set's SOP Instance UID, and the file meta's where it is another."""
    try:
        dataset = dcmread(io.BytesIO(whole), stop_before_pixels=True)
        found = [dataset.get("SOPInstanceUID"), dataset.file_meta.get("MediaStorageSOPInstanceUID")]
    except (InvalidDicomError, EOFError, ValueError, NotImplementedError, AttributeError, KeyError, zlib.error):
        return []
    return [uid.encode() for uid in dict.fromkeys(str(uid) for uid in found if uid) if len(uid) >= 16]


def _opened(whole: bytes) -> tuple[bytes, bytes, bool]:
    """(file meta, data set, whether the data set was deflated)."""
    stream = io.BytesIO(whole)
    try:
        envelope = open_envelope(stream)
    except Unreadable:
        return whole, b"", False
    head, body = whole[: envelope.offset], whole[envelope.offset :]
    if envelope.transfer_syntax != DEFLATED_LE:
        return head, body, False
    return head, zlib.decompressobj(-zlib.MAX_WBITS).decompress(body), True
