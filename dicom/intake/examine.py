"""Examine one file: envelope, header, rules, pixels, plate. Everything that may be slow or hostile; runs in a worker.

Reads the one file it is given and writes nothing; knows no inbox, no store and no ledger.
"""

from pathlib import Path

import numpy as np
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID

from dicom.dataset import header
from dicom.dataset.elements import PIXEL_DATA
from dicom.dataset.facts import HEARTBEAT_ID, Examined, Image, Outcome
from dicom.dataset.part10 import HOSTILE, Header, content_sha256, is_uid, open_envelope, read_header
from dicom.dataset.part10 import shown as short_and_plain
from dicom.errors import BlankImage, Quarantined, Rejected, Unreadable
from dicom.intake.admission import Admission, check_header
from dicom.pixels.plate import decode, pixel_sha256, render
from dicom.pixels.quality_filter import fault
from dicom.pseudonyms import patient_key

__all__ = ["Admission", "examine", "unexamined"]

MAX_FILE = 512 << 20  # bytes; ten times the largest uncompressed image


def examine(path: Path, key: bytes, rules: Admission) -> Examined:
    """What to do with the file at `path`, and all facts of it when admitted. Raises OSError only."""
    size = path.stat().st_size
    if size > MAX_FILE:
        return unexamined(path, key, f"file of {size >> 20} MiB: larger than any image")
    sha256 = content_sha256(path)
    with path.open("rb") as stream:
        try:
            envelope = open_envelope(stream)
            found = read_header(stream, envelope.transfer_syntax)
        except Unreadable as error:
            return unexamined(path, key, str(error))
        return _judge(found, envelope.transfer_syntax, sha256, key, rules)


def unexamined(path: Path, key: bytes, reason: str) -> Examined:
    """Quarantined as it is, under the UIDs and the patient that seeks alone can tell. Raises OSError.

    The node may have acknowledged this image: storage commitment, `pull` and `forget` look for it by them.
    """
    sha256 = content_sha256(path)
    try:
        with path.open("rb") as stream:
            ds = read_header(stream, open_envelope(stream).transfer_syntax, pixels=False).dataset
    except Unreadable:
        return Examined("quarantined", reason, sha256)
    return _aside(ds, key, sha256, "quarantined", reason)


def _judge(found: Header, syntax: str, sha256: str, key: bytes, rules: Admission) -> Examined:
    ds = found.dataset
    sop_uid, study_uid, who, identified = _identity(ds, key)
    try:
        view = check_header(found, syntax, rules)
        stored, plate = _develop(found, syntax)
        if rules.quality and (why := fault(plate)):
            raise Rejected(why)
    except Rejected as refusal:
        return _aside(ds, key, sha256, "rejected", str(refusal))
    except BlankImage as blank:
        return _aside(ds, key, sha256, "rejected", str(blank))
    except Quarantined as suspicion:
        return _aside(ds, key, sha256, "quarantined", str(suspicion))
    except HOSTILE as error:
        said = str(error) if type(error) is ValueError else type(error).__name__
        return _aside(ds, key, sha256, "quarantined", f"not decodable: {shown_reason(said)}")
    image = _facts(ds, syntax, sha256, view, who, identified, pixel_sha256(stored))
    return Examined("admitted", None, sha256, sop_uid, study_uid, who, view, image, plate)


def _aside(ds: Dataset, key: bytes, sha256: str, outcome: Outcome, reason: str) -> Examined:
    sop_uid, study_uid, who, _ = _identity(ds, key)
    named, placed = (uid if is_uid(uid) else None for uid in (sop_uid, study_uid))
    return Examined(outcome, reason, sha256, named, placed, who)


def shown_reason(text: str) -> str:
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text)[:160]


def _identity(ds: Dataset, key: bytes) -> tuple[str, str, str, bool]:
    study_uid = header.text(ds, "StudyInstanceUID")
    who, identified = patient_key(key, header.text(ds, "PatientID"), header.text(ds, "IssuerOfPatientID"), study_uid)
    return header.text(ds, "SOPInstanceUID"), study_uid, who, identified


def _develop(found: Header, syntax: str) -> tuple[np.ndarray, np.ndarray]:
    """(stored values, plate) of a header that passed every check."""
    ds = found.dataset
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = UID(syntax)
    ds[PIXEL_DATA] = DataElement(PIXEL_DATA, found.pixel_vr, found.pixel_bytes(), already_converted=True)
    stored = decode(ds)
    return stored, render(ds, stored)


def _facts(ds: Dataset, syntax: str, sha256: str, view: str, who: str, identified: bool, pixels: str) -> Image:
    sex = header.text(ds, "PatientSex").upper()[:1]
    scanner = f"{header.text(ds, 'Manufacturer')} {header.text(ds, 'ManufacturerModelName')}".strip()
    return Image(
        sop_uid=header.text(ds, "SOPInstanceUID"),
        sop_class=header.text(ds, "SOPClassUID"),
        study_uid=header.text(ds, "StudyInstanceUID"),
        patient_key=who,
        identified=identified,
        view=view,
        acquired_at=header.acquired_at(ds),
        modality=header.text(ds, "Modality").upper(),
        transfer_syntax=syntax,
        rows=header.short(ds, "Rows") or 0,
        columns=header.short(ds, "Columns") or 0,
        photometric=header.text(ds, "PhotometricInterpretation").upper(),
        sex=sex if sex in ("M", "F") else None,
        age_years=header.age_years(ds),
        scanner=short_and_plain(scanner) if scanner else None,
        sha256=sha256,
        pixel_sha256=pixels,
        heartbeat=header.text(ds, "PatientID") == HEARTBEAT_ID,
    )
