"""The images of the acceptance run: choice of Kermany images, their DICOM files, and copies with new UIDs."""

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
from bench.common.public_images import read_set
from dicom.dataset.part10 import DEFLATED_LE, Unreadable, open_envelope
from dicom.phantom.wrap import wrap
from dicom.pseudonyms import patient_key

FINDING = "Pneumonia"
LABELLED = 10  # one training image in ten has a label


@dataclass(frozen=True)
class Image:
    """One Kermany image: picture, patient (the id includes the split), truth, and the range of its patient."""

    picture: Path
    patient: str
    truth: int
    range: str


def read_images(folder: Path, key: bytes, shares: PatientKeys) -> list[Image]:
    """Return every image of the set with its patient's range under the site's key."""
    images = []
    for row in read_set(folder):
        pseudonym, identified = patient_key(key, row.patient, "", "")
        where = range_of(key, pseudonym, identified, shares)
        images.append(Image(row.picture, row.patient, row.has(FINDING), where))
    return images


def choose(images: list[Image], total: int, golden: int, seed: int) -> list[Image]:
    """Choose `total` images: `golden` of the golden range, one of every patient first, the rest of the other ranges.

    The golden share is larger than in a site's stream: 400 in 1,500, where the patients' hash gives a tenth.
    """
    draw = random.Random(seed)
    by_patient: dict[str, list[Image]] = defaultdict(list)
    rest = []
    for image in images:
        if image.range == "golden":
            by_patient[image.patient].append(image)
        else:
            rest.append(image)
    for own in by_patient.values():
        draw.shuffle(own)
    firsts = [own[0] for own in by_patient.values()]
    seconds = [image for own in by_patient.values() for image in own[1:]]
    for part in (firsts, seconds, rest):
        draw.shuffle(part)
    chosen = [*firsts, *seconds][:golden]
    chosen += rest[: total - len(chosen)]
    draw.shuffle(chosen)  # ranges arrive mixed, as in practice
    return chosen


def composition(images: list[Image]) -> dict[str, dict[str, int]]:
    """Return images, patients, and patients of each class, by range."""
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
    """Write each image as a DX DICOM file to `folder`; return file -> (SOP Instance UID, image)."""
    folder.mkdir(parents=True)
    files = {}
    for number, image in enumerate(images):
        dataset = wrap(image.picture, image.patient, "AP")
        path = folder / f"image{number:05d}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        files[path] = (str(dataset.SOPInstanceUID), image)
    return files


def write_labels(files: dict[Path, tuple[str, Image]], table: Path, seed: int) -> dict[str, int]:
    """Write a CSV with the labels of a tenth of the training range and of all other ranges; return counts by range."""
    draw = random.Random(seed)
    by_range: dict[str, list[tuple[str, Image]]] = defaultdict(list)
    for uid, image in files.values():
        by_range[image.range].append((uid, image))
    train = sorted(by_range["train"])
    draw.shuffle(train)
    chosen = {"train": train[: max(1, round(len(train) / LABELLED))]}
    chosen |= {name: by_range[name] for name in ("golden", "calibration", "validation")}
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("sop_uid", "finding", "value", "source", "by"))
        for rows in chosen.values():
            writer.writerows((uid, FINDING, image.truth, "report", "data set") for uid, image in rows)
    return {name: len(rows) for name, rows in chosen.items()}


def under_new_uid(source: Path, target: Path, number: int) -> str | None:
    """Copy a file with a new SOP Instance UID of the same length and no other change; return the new UID.

    Return None after a plain copy if no UID can be read. A deflated data set is inflated and deflated again.
    """
    whole = source.read_bytes()
    target.parent.mkdir(parents=True, exist_ok=True)
    uids = _uids(whole)
    if not uids:
        target.write_bytes(whole)
        return None
    head, body, deflated = _split(whole)
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
    """Return the data set's SOP Instance UID, and that of the file meta if it differs."""
    try:
        dataset = dcmread(io.BytesIO(whole), stop_before_pixels=True)
        uids = [dataset.get("SOPInstanceUID"), dataset.file_meta.get("MediaStorageSOPInstanceUID")]
    except (InvalidDicomError, EOFError, ValueError, NotImplementedError, AttributeError, KeyError, zlib.error):
        return []
    return [uid.encode() for uid in dict.fromkeys(str(uid) for uid in uids if uid) if len(uid) >= 16]


def _split(whole: bytes) -> tuple[bytes, bytes, bool]:
    """Return (file meta, inflated data set, whether it was deflated)."""
    stream = io.BytesIO(whole)
    try:
        envelope = open_envelope(stream)
    except Unreadable:
        return whole, b"", False
    head, body = whole[: envelope.offset], whole[envelope.offset :]
    if envelope.transfer_syntax != DEFLATED_LE:
        return head, body, False
    return head, zlib.decompressobj(-zlib.MAX_WBITS).decompress(body), True
