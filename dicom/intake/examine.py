"""Examine one file: envelope, header, rules, pixels, plate. May be slow or meet hostile bytes, so it runs in a worker.

Reads one file and writes nothing. Must not import inbox, store or ledger.
"""

from pathlib import Path

from pydicom.dataset import Dataset

from dicom.dataset import header
from dicom.dataset.facts import HEARTBEAT_ID, Examined, Image, Outcome
from dicom.dataset.part10 import HOSTILE, Header, content_sha256, is_uid, open_envelope, read_header, shown
from dicom.errors import BlankImage, Quarantined, Rejected, Unreadable
from dicom.intake.admission import Admission, check_header
from dicom.pixels.plate import decode, pixel_sha256, render
from dicom.pixels.quality_filter import fault
from dicom.pseudonyms import patient_key

__all__ = ["Admission", "examine", "unexamined"]

MAX_FILE = 512 << 20  # bytes; ten times the largest uncompressed image


def examine(path: Path, key: bytes, rules: Admission) -> Examined:
    """Return the outcome for the file at `path`, with its facts and plate when admitted. Raises OSError only."""
    size = path.stat().st_size
    if size > MAX_FILE:
        return unexamined(path, key, f"file of {size >> 20} MiB: larger than any image")
    sha256 = content_sha256(path)
    with path.open("rb") as stream:
        try:
            envelope = open_envelope(stream)
            image = read_header(stream, envelope.transfer_syntax)
        except Unreadable as error:
            return unexamined(path, key, str(error))
        return _outcome(image, envelope.transfer_syntax, sha256, key, rules)


def unexamined(path: Path, key: bytes, reason: str) -> Examined:
    """Return the outcome "quarantined" with the UIDs and the patient, read without decoding. Raises OSError.

    The node may have acknowledged this image, so storage commitment, `pull` and `forget` must be able to find it.
    """
    sha256 = content_sha256(path)
    try:
        with path.open("rb") as stream:
            ds = read_header(stream, open_envelope(stream).transfer_syntax, pixels=False).dataset
    except Unreadable:
        return Examined("quarantined", reason, sha256)
    return _aside(ds, key, sha256, "quarantined", reason)


def _outcome(image: Header, syntax: str, sha256: str, key: bytes, rules: Admission) -> Examined:
    ds = image.dataset
    sop_uid, study_uid, patient, identified = _identity(ds, key)
    try:
        view = check_header(image, syntax, rules)
        image.with_pixels(syntax)
        stored = decode(ds)
        plate = render(ds, stored)
        if rules.quality and (why := fault(plate)):
            raise Rejected(why)
    except (Rejected, BlankImage) as reason:
        return _aside(ds, key, sha256, "rejected", str(reason))
    except Quarantined as reason:
        return _aside(ds, key, sha256, "quarantined", str(reason))
    except HOSTILE as error:
        message = str(error) if type(error) is ValueError else type(error).__name__
        return _aside(ds, key, sha256, "quarantined", f"not decodable: {_printable(message)}")
    facts = _facts(ds, syntax, sha256, view, patient, identified, pixel_sha256(stored))
    return Examined("admitted", None, sha256, sop_uid, study_uid, patient, view, facts, plate)


def _aside(ds: Dataset, key: bytes, sha256: str, outcome: Outcome, reason: str) -> Examined:
    sop_uid, study_uid, patient, _ = _identity(ds, key)
    sop_uid, study_uid = (uid if is_uid(uid) else None for uid in (sop_uid, study_uid))
    return Examined(outcome, reason, sha256, sop_uid, study_uid, patient)


def _printable(text: str) -> str:
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text)[:160]


def _identity(ds: Dataset, key: bytes) -> tuple[str, str, str, bool]:
    study_uid = header.text(ds, "StudyInstanceUID")
    patient, identified = patient_key(
        key, header.text(ds, "PatientID"), header.text(ds, "IssuerOfPatientID"), study_uid
    )
    return header.text(ds, "SOPInstanceUID"), study_uid, patient, identified


def _facts(ds: Dataset, syntax: str, sha256: str, view: str, patient: str, identified: bool, pixels: str) -> Image:
    sex = header.text(ds, "PatientSex").upper()[:1]
    scanner = f"{header.text(ds, 'Manufacturer')} {header.text(ds, 'ManufacturerModelName')}".strip()
    return Image(
        sop_uid=header.text(ds, "SOPInstanceUID"),
        sop_class=header.text(ds, "SOPClassUID"),
        study_uid=header.text(ds, "StudyInstanceUID"),
        patient_key=patient,
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
        scanner=shown(scanner) if scanner else None,
        sha256=sha256,
        pixel_sha256=pixels,
        heartbeat=header.text(ds, "PatientID") == HEARTBEAT_ID,
    )
