"""Which images the site takes in, judged by their header alone: cheap, ordered, each refusal with tag and value.

Decodes nothing, opens nothing; see docs/decisions.md for the reasons behind the rules.
"""

import re
from dataclasses import dataclass

from pydicom.dataset import Dataset

from dicom.dataset import header
from dicom.dataset.facts import RESULT_DEVICE, RESULT_UID_ROOT, SOP_CLASSES
from dicom.dataset.part10 import DEFLATED_LE, NATIVE, UNDEFINED, Header, is_uid, shown
from dicom.dataset.syntaxes import SYNTAXES
from dicom.errors import Quarantined, Rejected

MAX_PIXELS = 100_000_000  # the largest detectors have 30 million; a bound on what any decoder may be asked for
ADULT = 18  # years
CHEST = {"CHEST", "THORAX", "LUNG", "LUNGS"}
# Thorax, chest, lung, thoracic cavity; in SNOMED CT and in the older SRT spelling
CHEST_CODES = {"51185008", "816094009", "39607008", "43799004", "T-D3000", "T-28000", "T-D3200"}
VIEW_CODES = {"399348003": "AP", "R-10206": "AP", "272479007": "PA", "R-10214": "PA", "R-40888": "PA"}
VIEW_WORDS = {
    "PA": "PA",
    "AP": "AP",
    "POSTEROANTERIOR": "PA",
    "ANTEROPOSTERIOR": "AP",
}
HARMLESS = {"ERECT", "UPRIGHT", "SUPINE", "SITTING", "STANDING", "PORTABLE", "MOBILE", "BEDSIDE", "BED", "FRONTAL"}


@dataclass(frozen=True)
class Admission:
    """The site's rules. `children` False refuses images whose header says that the patient is under 18.

    `quality` True also asks the pixels (dicom.pixels.quality_filter), once the header has nothing against the image.
    """

    children: bool = False
    min_side: int = 64  # pixels
    quality: bool = False


def check_header(found: Header, syntax: str, rules: Admission) -> str:
    """Return the view ("PA" or "AP"). Raises Rejected or Quarantined."""
    ds = found.dataset
    _identity(ds)
    _kind(ds)
    _body_part(ds)
    view = _view(ds)
    _age(ds, rules)
    _pixels(found, syntax, rules)
    return view


def _refuse(tag: str, value: object, why: str) -> Rejected:
    return Rejected(f"{tag} = {shown(value)}: {why}")


def _identity(ds: Dataset) -> None:
    sop_uid = header.text(ds, "SOPInstanceUID")
    if sop_uid.startswith(RESULT_UID_ROOT):
        raise _refuse("SOPInstanceUID (0008,0018)", RESULT_UID_ROOT + "*", "one of our own results")
    if header.text(ds, "ManufacturerModelName").casefold() == RESULT_DEVICE:
        raise _refuse("ManufacturerModelName (0008,1090)", RESULT_DEVICE, "one of our own results")
    sop_class = header.text(ds, "SOPClassUID")
    if sop_class and is_uid(sop_class) and sop_class not in SOP_CLASSES:
        raise _refuse("SOPClassUID (0008,0016)", sop_class, "not CR, DX or Secondary Capture")
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
        raise _refuse("Modality (0008,0060)", modality, "not CR or DX")
    image_type = [part.upper() for part in header.values(ds, "ImageType")]
    if image_type[:2] == ["DERIVED", "SECONDARY"]:
        raise _refuse("ImageType (0008,0008)", "\\".join(image_type), "made from another image")
    frames = header.text(ds, "NumberOfFrames")
    if frames.lstrip("+0") not in ("", "1"):
        raise _refuse("NumberOfFrames (0028,0008)", frames, "not a single frame")


def _words(value: str) -> list[str]:
    joined = re.sub(r"(POSTERO|ANTERO)[-_ ]?(ANTERIOR|POSTERIOR)", r"\1\2", value.upper())
    return [word for word in re.split(r"[^A-Z0-9]+", joined) if word]


def _body_part(ds: Dataset) -> None:
    part = header.text(ds, "BodyPartExamined")
    words = _words(part)
    if words:
        if not (set(words) & CHEST and set(words) <= CHEST | HARMLESS | set(VIEW_WORDS)):
            raise _refuse("BodyPartExamined (0018,0015)", part, "not the chest")
        return
    regions = header.codes(ds, "AnatomicRegionSequence")
    if regions and not set(regions) & CHEST_CODES:
        raise _refuse("AnatomicRegionSequence (0008,2218)", regions[0], "not the chest")


def _view(ds: Dataset) -> str:
    """ViewPosition, else ViewCodeSequence, else PatientPosition or PatientOrientation that say PA or AP."""
    position = header.text(ds, "ViewPosition")
    rows = header.values(ds, "PatientOrientation")[:1]
    if position:
        view = _frontal(position)
        if view is None:
            raise _refuse("ViewPosition (0018,5101)", position, "not PA or AP")
        if rows and rows[0].upper() in ("A", "P"):
            raise _refuse("PatientOrientation (0020,0020)", rows[0], f"a lateral, although ViewPosition is {view}")
        return view
    view_codes = header.codes(ds, "ViewCodeSequence")
    if view_codes:
        if view_codes[0] not in VIEW_CODES:
            raise _refuse("ViewCodeSequence (0054,0220)", view_codes[0], "not PA or AP")
        return VIEW_CODES[view_codes[0]]
    for keyword in ("PatientPosition", "PatientOrientation"):
        view = _frontal(header.text(ds, keyword))
        if view:
            return view
    if rows and rows[0].upper() in ("A", "P"):
        raise _refuse("PatientOrientation (0020,0020)", rows[0], "a lateral")
    said = header.text(ds, "PatientPosition")
    raise Rejected(
        "view unknown: ViewPosition (0018,5101) is empty"
        + (f" and PatientPosition (0018,5100) = {shown(said)}" if said else "")
    )


def _frontal(value: str) -> str | None:
    words = _words(value)
    views = {VIEW_WORDS[word] for word in words if word in VIEW_WORDS}
    if len(views) == 1 and set(words) <= set(VIEW_WORDS) | HARMLESS | CHEST:
        return views.pop()
    return None


def _age(ds: Dataset, rules: Admission) -> None:
    age = header.age_years(ds)
    if not rules.children and age is not None and age < ADULT:
        stated = header.text(ds, "PatientAge")
        tag = "PatientAge (0010,1010)" if stated else "PatientBirthDate (0010,0030) to StudyDate"
        raise _refuse(tag, stated or f"{int(age)} years", "under 18, and the site takes no children's images")


def _pixels(found: Header, syntax: str, rules: Admission) -> None:
    ds = found.dataset
    if syntax not in SYNTAXES:
        raise _refuse("TransferSyntaxUID (0002,0010)", syntax, "a syntax we don't decode")
    if found.pixel_length is None:
        raise Quarantined("PixelData (7FE0,0010) is missing")
    photometric = header.text(ds, "PhotometricInterpretation").upper()
    if photometric.startswith(("RGB", "YBR", "PALETTE", "HSV", "ARGB", "CMYK", "XYB")):
        raise _refuse("PhotometricInterpretation (0028,0004)", photometric, "not grayscale")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise Quarantined(f"PhotometricInterpretation (0028,0004) = {shown(photometric)}: no such interpretation")
    samples = header.short(ds, "SamplesPerPixel")
    if samples not in (None, 1):
        raise _refuse("SamplesPerPixel (0028,0002)", samples, "not grayscale")
    rows, columns = header.short(ds, "Rows") or 0, header.short(ds, "Columns") or 0
    if min(rows, columns) == 0:
        raise Quarantined(f"Rows (0028,0010) x Columns (0028,0011) = {rows} x {columns}")
    if min(rows, columns) < rules.min_side:
        size = f"{rows} x {columns}"
        raise _refuse("Rows (0028,0010) x Columns (0028,0011)", size, f"under {rules.min_side} px a side")
    if rows * columns > MAX_PIXELS:
        raise Quarantined(f"Rows (0028,0010) x Columns (0028,0011) = {rows} x {columns}: larger than any detector")
    _depth(ds)
    _length(found, syntax, rows, columns)


def _depth(ds: Dataset) -> None:
    allocated = header.short(ds, "BitsAllocated")
    stored = header.short(ds, "BitsStored") or 0
    high = header.short(ds, "HighBit")
    if allocated not in (8, 16):
        raise _refuse("BitsAllocated (0028,0100)", allocated, "not 8 or 16")
    if not 1 < stored <= allocated:
        raise Quarantined(f"BitsStored (0028,0101) = {stored} of {allocated} bits allocated")
    if high is not None and not stored - 1 <= high < allocated:
        raise Quarantined(f"HighBit (0028,0102) = {high} with {stored} bits stored")
    if header.short(ds, "PixelRepresentation") not in (None, 0, 1):
        raise Quarantined("PixelRepresentation (0028,0103) is neither 0 nor 1")


def _length(found: Header, syntax: str, rows: int, columns: int) -> None:
    if syntax not in NATIVE:
        if found.pixel_length != UNDEFINED:
            raise Quarantined("PixelData (7FE0,0010) is not encapsulated, although its transfer syntax is compressed")
        return
    allocated = header.short(found.dataset, "BitsAllocated") or 16
    needed = rows * columns * allocated // 8
    if found.pixel_length == UNDEFINED:
        raise Quarantined("PixelData (7FE0,0010) is encapsulated, although its transfer syntax is not compressed")
    if found.pixel_length not in (needed, needed + needed % 2):
        kind = "inflated " if syntax == DEFLATED_LE else ""
        raise Quarantined(
            f"PixelData (7FE0,0010) has {found.pixel_length} {kind}bytes, {rows} x {columns} needs {needed}"
        )
