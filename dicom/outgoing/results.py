"""The attributes that every result has: UIDs, patient, study, equipment, time.

Copies valid attributes of patient and study byte for byte, in the image's own character set. The objects are made by
structured_report.py (SR) and secondary_capture.py (SC). Must not import a model, a ledger or the network.
"""

import hashlib
import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from pydicom.charset import convert_encodings, decode_bytes, python_encoding
from pydicom.datadict import dictionary_VR, keyword_dict
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import UID

from dicom.dataset import header
from dicom.dataset.facts import RESULT_DEVICE, RESULT_UID_ROOT
from dicom.dataset.part10 import (
    IMPLEMENTATION_NAME,
    IMPLEMENTATION_UID,
    IMPLICIT_LE,
    is_uid,
    open_envelope,
    read_header,
)
from dicom.dataset.syntaxes import SURELY_LOSSY
from dicom.errors import HeaderIncomplete

NOTICE = "RESEARCH USE ONLY - NOT FOR DIAGNOSIS"
SYNTAX = IMPLICIT_LE  # every receiver must accept it (PS3.5 10.1)
SERIES_NUMBERS = {"sr": 7427, "sc": 7428}  # far above the series numbers of a modality

# Patient, General Study and Patient Study modules (PS3.3 C.7.1.1, C.7.2.1, C.7.2.2); sequences are not copied
IDENTIFYING = (
    "PatientID",
    "IssuerOfPatientID",
    "AccessionNumber",
)  # the PACS matches by these: copied even if not valid
EMPTY_IF_UNKNOWN = (  # type 2
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID", "AccessionNumber",
    "ReferringPhysicianName",
)  # fmt: skip
OPTIONAL = (
    "IssuerOfPatientID",
    "PatientBirthTime",
    "EthnicGroup",
    "StudyDescription",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
)
# PN (PS3.5 6.2.1): at most three groups of 64 characters, each of at most five components
_GROUP = r"(?=[^=]{0,64}(?:=|\Z))[^=^\x00-\x1a\x1c-\x1f]*(?:\^[^=^\x00-\x1a\x1c-\x1f]*){0,4}"
_VALID = {
    "AS": re.compile(r"\d{3}[DWMY]"),
    "DA": re.compile(r"\d{8}"),
    "DS": re.compile(r"(?=.{1,16}$)[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?"),
    "TM": re.compile(r"([01]\d|2[0-3])([0-5]\d([0-5]\d(\.\d{1,6})?)?)?"),
    "SH": re.compile(r"[^\\\x00-\x1a\x1c-\x1f]{1,16}"),  # ESC changes the character set (PS3.5 6.1.2.5)
    "LO": re.compile(r"[^\\\x00-\x1a\x1c-\x1f]{1,64}"),
    "PN": re.compile(rf"{_GROUP}(?:={_GROUP}){{0,2}}"),
}
_ANY = re.compile(r".+", re.S)


@dataclass(frozen=True)
class Score:
    """The model's probability for one finding, and the threshold from its bundle."""

    finding: str
    probability: float
    threshold: float

    @property
    def above(self) -> bool:
        """Whether the probability is at or above the threshold."""
        return self.probability >= self.threshold


@dataclass(frozen=True)
class Scored:
    """The scores of one image, with model bundle, time and device."""

    sha256: str  # of the image
    bundle: str
    scores: tuple[Score, ...]
    at: datetime  # aware, in the site's time zone
    device: str  # hex id of this appliance
    version: str  # of the software

    def uid(self, kind: str, *more: str) -> str:
        """Return the UID of a result; always the same, so that a retry sends the same object."""
        return result_uid(self.device, self.sha256, self.bundle, kind, *more)


def result_uid(*parts: str) -> str:
    """Return a UID under our own root, derived from `parts`. Admission rejects images with such a UID."""
    digest = hashlib.sha256("\n".join(parts).encode()).digest()
    return RESULT_UID_ROOT + str(int.from_bytes(digest[:13]))  # 104 bits: 32 digits at most


def read_image(path: Path) -> Dataset:
    """Return the header of an original; marks it as lossy if its syntax is. Raises Unreadable, OSError."""
    with path.open("rb") as stream:
        syntax = open_envelope(stream).transfer_syntax
        image = read_header(stream, syntax).dataset
    if syntax in SURELY_LOSSY:
        image.LossyImageCompression = "01"
    return image


def reference(image: Dataset) -> Dataset:
    """Return a data set with only the UIDs of an image and an empty patient, for highdicom. Raises HeaderIncomplete."""
    ds = Dataset()
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        value = header.text(image, keyword)
        if not is_uid(value):
            raise HeaderIncomplete(f"the image has no valid {keyword}")
        setattr(ds, keyword, value)
    for keyword in EMPTY_IF_UNKNOWN:
        setattr(ds, keyword, "")
    return ds


def finish(result: Dataset, image: Dataset, scored: Scored) -> Dataset:
    """Add patient and study of the image, our device, time and file meta to a result, and return it."""
    charset = character_set(image)
    if charset:
        result.SpecificCharacterSet = list(charset)
    elif "SpecificCharacterSet" in result:
        del result.SpecificCharacterSet
    for keyword in (*EMPTY_IF_UNKNOWN, *OPTIONAL):
        value = _value(image, keyword)
        tag = Tag(keyword_dict[keyword])
        if tag in result:
            del result[tag]
        if value or keyword in EMPTY_IF_UNKNOWN:
            # raw, so that the bytes stay unchanged and no library prints or checks them
            result[tag] = RawDataElement(tag, dictionary_VR(tag), len(value), value, 0, True, True)
    result.StudyInstanceUID = header.text(image, "StudyInstanceUID")
    _times(result, image, scored.at)
    result.Manufacturer, result.ManufacturerModelName = "cxrloop", RESULT_DEVICE
    result.DeviceSerialNumber, result.SoftwareVersions = scored.device[:16], [scored.version, scored.bundle]
    meta = result.file_meta
    meta.TransferSyntaxUID = UID(SYNTAX)
    meta.ImplementationClassUID, meta.ImplementationVersionName = UID(IMPLEMENTATION_UID), IMPLEMENTATION_NAME
    result.set_original_encoding(True, True, convert_encodings(list(charset) or None))
    return result


def character_set(image: Dataset) -> tuple[str, ...]:
    """Return SpecificCharacterSet for a result: the image's, else one that fits the image's bytes; () is ASCII."""
    declared = _declared(image)
    raw = b"\n".join(_value(image, keyword) for keyword in (*EMPTY_IF_UNKNOWN, *OPTIONAL))
    if declared and all(name in python_encoding for name in declared):
        if len(declared) > 1 or b"\x1b" in raw:
            return declared  # code extensions: escape sequences select the characters
        if _decodes(raw, python_encoding[next(iter(declared))]):
            return declared
    if raw.isascii():
        return ()
    return ("ISO_IR 192",) if _decodes(raw, "utf-8") else ("ISO_IR 100",)


def _declared(image: Dataset) -> tuple[str, ...]:
    """Return SpecificCharacterSet as spelt in PS3.3 C.12.1.1.2; GBK becomes GB18030, which contains it."""
    names = (
        re.sub(r"^ISO(.2022)?.IR.?(\d+)$", _iso_name, name) for name in header.values(image, "SpecificCharacterSet")
    )
    return tuple("GB18030" if name == "GBK" else name for name in names)


def _iso_name(match: re.Match[str]) -> str:
    return f"ISO 2022 IR {match[2]}" if match[1] else f"ISO_IR {match[2]}"


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode("ascii" if encoding == "iso8859" else encoding)
    except UnicodeDecodeError:
        return False
    return True


def _value(image: Dataset, keyword: str) -> bytes:
    """Return the value's bytes, padded to an even length; b"" when it is absent or not valid."""
    element = image.get_item(Tag(keyword_dict[keyword]))
    value = element.value if element is not None else None
    if not isinstance(value, bytes):
        return b""
    value = value.strip(b" \0")
    vr = dictionary_VR(keyword)
    text = value.decode("latin-1")
    if vr == "DA":
        day = header.day(image, keyword)
        text = day.strftime("%Y%m%d") if day else ""
    elif vr == "TM":
        text = text.replace(":", "")
    elif keyword == "PatientSex":
        text = text if text in ("M", "F", "O") else ""
    elif vr == "PN" and b"\x1b" not in value and not header.text(image, "SpecificCharacterSet").startswith("GB"):
        # the first name; in code extensions and GB a backslash may be the second byte of a character
        value = value.split(b"\\")[0].strip()
        text = _characters(image, value)
    elif vr in ("SH", "LO", "PN"):
        text = _characters(image, value)
    valid = _ANY if keyword in IDENTIFYING else _VALID.get(vr, _ANY)
    if not valid.fullmatch(text):
        return b""
    value = text.encode("ascii") if vr in ("DA", "TM", "CS", "AS", "DS") and text.isascii() else value
    return value + b" " * (len(value) % 2)


def _characters(image: Dataset, value: bytes) -> str:
    """Return the value decoded, to count its characters; by the image's character set, else by one that fits."""
    declared = _declared(image)
    if value.isascii() and b"\x1b" not in value:
        return value.decode("ascii")
    if declared and all(name in python_encoding for name in declared):
        return decode_bytes(value, convert_encodings(list(declared)), set())
    return value.decode("utf-8" if _decodes(value, "utf-8") else "latin-1")


def _times(result: Dataset, image: Dataset, at: datetime) -> None:
    """Set the creation dates and times; in the image's offset from UTC if it has one, which applies to all times."""
    offset = header.text(image, "TimezoneOffsetFromUTC")
    if re.fullmatch(r"[+-](0\d|1[0-4])[0-5]\d", offset):
        sign = -1 if offset[0] == "-" else 1
        at = at.astimezone(timezone(sign * timedelta(hours=int(offset[1:3]), minutes=int(offset[3:]))))
        result.TimezoneOffsetFromUTC = offset
    day, clock = at.strftime("%Y%m%d"), at.strftime("%H%M%S")
    result.ContentDate = result.InstanceCreationDate = day
    result.ContentTime = result.InstanceCreationTime = clock
    for library in result.get("ContributingEquipmentSequence", ()):  # highdicom, which set another time
        library.ContributionDateTime = day + clock
