"""The header rules of admission: cheap, in a fixed order, each reason with tag and value.

Decodes no pixels and opens no file; docs/decisions.md gives the reasons for the rules.
"""

import re
from dataclasses import dataclass

from pydicom.dataset import Dataset

from dicom.dataset import header
from dicom.dataset.chest_codes import CHEST_CODES, CHEST_WORDS, VIEW_OF_CODE
from dicom.dataset.facts import RESULT_DEVICE, RESULT_UID_ROOT, SOP_CLASSES
from dicom.dataset.part10 import DEFLATED_LE, NATIVE, UNDEFINED, Header, is_uid, shown
from dicom.dataset.syntaxes import SYNTAXES
from dicom.errors import Quarantined, Rejected

MAX_PIXELS = 100_000_000  # the largest detectors have 30 million; limits the memory of every decoder
ADULT = 18  # years
VIEW_WORDS = {
    "PA": "PA",
    "AP": "AP",
    "POSTEROANTERIOR": "PA",
    "ANTEROPOSTERIOR": "AP",
}
POSITION_WORDS = {
    "ERECT",
    "UPRIGHT",
    "SUPINE",
    "SITTING",
    "STANDING",
    "PORTABLE",
    "MOBILE",
    "BEDSIDE",
    "BED",
    "FRONTAL",
}


@dataclass(frozen=True)
class Admission:
    """The site's settings. `children` False rejects images whose header has an age under 18.

    `quality` True also applies dicom.pixels.quality_filter to images that pass the header rules.
    """

    children: bool = False
    min_side: int = 64  # pixels
    quality: bool = False


def check_header(image: Header, syntax: str, rules: Admission) -> str:
    """Apply all rules to a header and return the view ("PA" or "AP"). Raises Rejected or Quarantined."""
    ds = image.dataset
    _identity(ds)
    _kind(ds)
    _body_part(ds)
    view = _view(ds)
    _age(ds, rules)
    _pixels(image, syntax, rules)
    return view


def _rejected(tag: str, value: object, why: str) -> Rejected:
    return Rejected(f"{tag} = {shown(value)}: {why}")


def _identity(ds: Dataset) -> None:
    sop_uid = header.text(ds, "SOPInstanceUID")
    if sop_uid.startswith(RESULT_UID_ROOT):
        raise _rejected("SOPInstanceUID (0008,0018)", RESULT_UID_ROOT + "*", "one of our own results")
    if header.text(ds, "ManufacturerModelName").casefold() == RESULT_DEVICE:
        raise _rejected("ManufacturerModelName (0008,1090)", RESULT_DEVICE, "one of our own results")
    sop_class = header.text(ds, "SOPClassUID")
    if sop_class and is_uid(sop_class) and sop_class not in SOP_CLASSES:
        raise _rejected("SOPClassUID (0008,0016)", sop_class, "not CR, DX or Secondary Capture")
    if not is_uid(sop_class):
        raise Quarantined(f"SOPClassUID (0008,0016) = {shown(sop_class)}: missing or not a UID")
    if not is_uid(sop_uid):
        raise Quarantined(f"SOPInstanceUID (0008,0018) = {shown(sop_uid)}: missing or not a UID")
    study_uid = header.text(ds, "StudyInstanceUID")
    if not is_uid(study_uid):
        raise Quarantined(f"StudyInstanceUID (0020,000D) = {shown(study_uid)}: missing or not a UID")


def _kind(ds: Dataset) -> None:
    modality = header.text(ds, "Modality").upper()
    if modality not in ("CR", "DX"):
        raise _rejected("Modality (0008,0060)", modality, "not CR or DX")
    image_type = [part.upper() for part in header.values(ds, "ImageType")]
    if image_type[:2] == ["DERIVED", "SECONDARY"]:
        raise _rejected("ImageType (0008,0008)", "\\".join(image_type), "made from another image")
    frames = header.text(ds, "NumberOfFrames")
    if frames.lstrip("+0") not in ("", "1"):
        raise _rejected("NumberOfFrames (0028,0008)", frames, "not a single frame")


def _words(value: str) -> list[str]:
    joined = re.sub(r"(POSTERO|ANTERO)[-_ ]?(ANTERIOR|POSTERIOR)", r"\1\2", value.upper())
    return [word for word in re.split(r"[^A-Z0-9]+", joined) if word]


def _body_part(ds: Dataset) -> None:
    part = header.text(ds, "BodyPartExamined")
    words = _words(part)
    if words:
        if not (set(words) & CHEST_WORDS and set(words) <= CHEST_WORDS | POSITION_WORDS | set(VIEW_WORDS)):
            raise _rejected("BodyPartExamined (0018,0015)", part, "not the chest")
        return
    regions = header.codes(ds, "AnatomicRegionSequence")
    if regions and not set(regions) & CHEST_CODES:
        raise _rejected("AnatomicRegionSequence (0008,2218)", regions[0], "not the chest")


def _view(ds: Dataset) -> str:
    """Return PA or AP from ViewPosition, else ViewCodeSequence, else PatientPosition or PatientOrientation."""
    position = header.text(ds, "ViewPosition")
    rows = header.values(ds, "PatientOrientation")[:1]
    if position:
        view = _frontal(position)
        if view is None:
            raise _rejected("ViewPosition (0018,5101)", position, "not PA or AP")
        if rows and rows[0].upper() in ("A", "P"):
            raise _rejected("PatientOrientation (0020,0020)", rows[0], f"a lateral, although ViewPosition is {view}")
        return view
    view_codes = header.codes(ds, "ViewCodeSequence")
    if view_codes:
        if view_codes[0] not in VIEW_OF_CODE:
            raise _rejected("ViewCodeSequence (0054,0220)", view_codes[0], "not PA or AP")
        return VIEW_OF_CODE[view_codes[0]]
    for keyword in ("PatientPosition", "PatientOrientation"):
        view = _frontal(header.text(ds, keyword))
        if view:
            return view
    if rows and rows[0].upper() in ("A", "P"):
        raise _rejected("PatientOrientation (0020,0020)", rows[0], "a lateral")
    patient_position = header.text(ds, "PatientPosition")
    raise Rejected(
        "view unknown: ViewPosition (0018,5101) is empty"
        + (f" and PatientPosition (0018,5100) = {shown(patient_position)}" if patient_position else "")
    )


def _frontal(value: str) -> str | None:
    words = _words(value)
    views = {VIEW_WORDS[word] for word in words if word in VIEW_WORDS}
    if len(views) == 1 and set(words) <= set(VIEW_WORDS) | POSITION_WORDS | CHEST_WORDS:
        return views.pop()
    return None


def _age(ds: Dataset, rules: Admission) -> None:
    age = header.age_years(ds)
    if not rules.children and age is not None and age < ADULT:
        stated = header.text(ds, "PatientAge")
        tag = "PatientAge (0010,1010)" if stated else "PatientBirthDate (0010,0030) to StudyDate"
        raise _rejected(tag, stated or f"{int(age)} years", "under 18, and the site admits no children's images")


def _pixels(image: Header, syntax: str, rules: Admission) -> None:
    ds = image.dataset
    if syntax not in SYNTAXES:
        raise _rejected("TransferSyntaxUID (0002,0010)", syntax, "cannot be decoded here")
    if image.pixel_length is None:
        raise Quarantined("PixelData (7FE0,0010) is missing")
    photometric = header.text(ds, "PhotometricInterpretation").upper()
    if photometric.startswith(("RGB", "YBR", "PALETTE", "HSV", "ARGB", "CMYK", "XYB")):
        raise _rejected("PhotometricInterpretation (0028,0004)", photometric, "not grayscale")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise Quarantined(f"PhotometricInterpretation (0028,0004) = {shown(photometric)}: not a defined value")
    samples = header.short(ds, "SamplesPerPixel")
    if samples not in (None, 1):
        raise _rejected("SamplesPerPixel (0028,0002)", samples, "not grayscale")
    rows, columns = header.short(ds, "Rows") or 0, header.short(ds, "Columns") or 0
    if min(rows, columns) == 0:
        raise Quarantined(f"Rows (0028,0010) x Columns (0028,0011) = {rows} x {columns}")
    if min(rows, columns) < rules.min_side:
        size = f"{rows} x {columns}"
        raise _rejected("Rows (0028,0010) x Columns (0028,0011)", size, f"shorter side under {rules.min_side} pixels")
    if rows * columns > MAX_PIXELS:
        raise Quarantined(f"Rows (0028,0010) x Columns (0028,0011) = {rows} x {columns}: larger than any detector")
    _depth(ds)
    _length(image, syntax, rows, columns)


def _depth(ds: Dataset) -> None:
    allocated = header.short(ds, "BitsAllocated")
    stored = header.short(ds, "BitsStored") or 0
    high = header.short(ds, "HighBit")
    if allocated not in (8, 16):
        raise _rejected("BitsAllocated (0028,0100)", allocated, "not 8 or 16")
    if not 1 < stored <= allocated:
        raise Quarantined(f"BitsStored (0028,0101) = {stored} of {allocated} bits allocated")
    if high is not None and not stored - 1 <= high < allocated:
        raise Quarantined(f"HighBit (0028,0102) = {high} with {stored} bits stored")
    if header.short(ds, "PixelRepresentation") not in (None, 0, 1):
        raise Quarantined("PixelRepresentation (0028,0103) is neither 0 nor 1")


def _length(image: Header, syntax: str, rows: int, columns: int) -> None:
    if syntax not in NATIVE:
        if image.pixel_length != UNDEFINED:
            raise Quarantined("PixelData (7FE0,0010) is not encapsulated, although its transfer syntax is compressed")
        return
    allocated = header.short(image.dataset, "BitsAllocated") or 16
    needed = rows * columns * allocated // 8
    if image.pixel_length == UNDEFINED:
        raise Quarantined("PixelData (7FE0,0010) is encapsulated, although its transfer syntax is not compressed")
    if image.pixel_length not in (needed, needed + needed % 2):
        kind = "inflated " if syntax == DEFLATED_LE else ""
        raise Quarantined(
            f"PixelData (7FE0,0010) has {image.pixel_length} {kind}bytes, {rows} x {columns} needs {needed}"
        )
