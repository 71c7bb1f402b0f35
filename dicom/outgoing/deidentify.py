"""De-identify an image for export: a new data set with only the attributes of the lists below.

Implements the Basic Application Confidentiality Profile of PS3.15 Annex E as an allow-list, with the options Retain
Patient Characteristics (sex, age) and Retain Longitudinal Temporal Information Modified Dates. Pixels are decoded and
written uncompressed, without overlay bits and without comments of a code stream. They are not inspected: a burned-in
name stays in the image, unless the header declares it (then the image is not exported).
"""

import math
import re
import struct
from datetime import date, timedelta
from pathlib import Path

import numpy as np
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID
from pydicom.valuerep import format_number_as_ds

from dicom.dataset import header
from dicom.dataset.chest_codes import CHEST, VIEWS, code_item
from dicom.dataset.facts import DIGITAL_XRAY_PRESENTATION, DIGITAL_XRAY_PROCESSING, SECONDARY_CAPTURE
from dicom.dataset.part10 import (
    EXPLICIT_LE,
    HOSTILE,
    IMPLEMENTATION_NAME,
    IMPLEMENTATION_UID,
    Header,
    open_envelope,
    read_header,
)
from dicom.dataset.syntaxes import SURELY_LOSSY
from dicom.errors import NotExportable, Quarantined, Rejected, Unreadable
from dicom.intake.admission import Admission, check_header
from dicom.pixels.plate import decode
from dicom.pseudonyms import days_back, export_key, export_uid, patient_key

ANY_AGE = Admission(children=True, min_side=1)  # the site's own limits do not apply to an export
OLDEST = 90  # years; higher ages are so rare that they could identify a patient

UIDS = ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
DATES = ("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate")
EMPTY = (  # Type 2 in the modules of CR and DX: required, may be empty
    "PatientBirthDate", "ReferringPhysicianName", "AccessionNumber", "StudyID", "StudyTime", "SeriesNumber",
    "InstanceNumber", "Manufacturer",
)  # fmt: skip
NUMBERS = (  # DS and IS: copied when they are valid numbers
    "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio", "KVP", "ExposureTime",
    "XRayTubeCurrent", "Exposure", "ExposureInuAs", "DistanceSourceToDetector", "DistanceSourceToPatient",
    "EstimatedRadiographicMagnificationFactor", "RelativeXRayExposure", "ExposureIndex", "TargetExposureIndex",
    "DeviationIndex", "Sensitivity", "WindowCenter", "WindowWidth", "RescaleIntercept", "RescaleSlope",
    "LossyImageCompressionRatio",
)  # fmt: skip
SHORTS = ("PixelPaddingValue", "PixelPaddingRangeLimit", "PixelIntensityRelationshipSign")  # US or SS
SIGNED = ("PixelIntensityRelationshipSign",)
WORDS = {  # CS, and LO used as CS: copied only if the value is listed here, because a CS can contain a name
    "Modality": ("CR", "DX"),
    "PatientSex": ("M", "F", "O"),
    "PhotometricInterpretation": ("MONOCHROME1", "MONOCHROME2"),
    "PresentationLUTShape": ("IDENTITY", "INVERSE"),
    "PresentationIntentType": ("FOR PRESENTATION", "FOR PROCESSING"),
    "PixelIntensityRelationship": ("LIN", "LOG"),
    "ImageLaterality": ("R", "L", "U", "B"),
    "Laterality": ("R", "L"),
    "DetectorType": ("DIRECT", "SCINTILLATOR", "STORAGE", "IMAGE"),
    "PositionerType": ("NONE", "COLUMN", "C-ARM", "CARM"),
    "VOILUTFunction": ("LINEAR", "LINEAR_EXACT", "SIGMOID"),
    "RescaleType": ("US", "OD", "UNSPECIFIED"),
    "BurnedInAnnotation": ("NO",),
    "LossyImageCompression": ("00", "01"),
    "LossyImageCompressionMethod": ("ISO_10918_1", "ISO_14495_1", "ISO_15444_1"),
}
TYPE_2 = (
    "PatientSex",
    "ImageLaterality",
    "DetectorType",
    "PositionerType",
)  # of DX, PatientSex of all: empty if unknown
METHOD = ["PS3.15 Basic Profile by allow-list", "dates shifted, pixels not inspected"]  # LO: 64 characters each
METHOD_CODES = (  # CID 7050
    ("113100", "Basic Application Confidentiality Profile"),
    ("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
    ("113108", "Retain Patient Characteristics Option"),
)


def deidentify(path: Path, key: bytes) -> Dataset:
    """Return the de-identified image: native pixels, explicit little endian, with file meta.

    With the site's `key`, a patient, study, series or image always gets the same new identity. Raises NotExportable
    for a file that is not a readable chest image, for a secondary capture, and for an image whose header declares a
    burned-in name or a recognizable face. Raises OSError.
    """
    with path.open("rb") as stream:
        try:
            envelope = open_envelope(stream)
            image = read_header(stream, envelope.transfer_syntax)
            view = _check_exportable(image, envelope.transfer_syntax)
            out = clean_header(image.dataset, view, key)
            _pixels(out, image, envelope.transfer_syntax)
        except (Rejected, Quarantined, Unreadable) as error:
            raise NotExportable(str(error)) from None
        except HOSTILE as error:
            raise NotExportable(f"not decodable: {type(error).__name__}") from None
    return out


def _check_exportable(image: Header, syntax: str) -> str:
    """Return the view. Raises NotExportable, and Rejected or Quarantined as at admission."""
    ds = image.dataset
    if header.text(ds, "SOPClassUID") == SECONDARY_CAPTURE:
        raise NotExportable("Secondary Capture: may show a name")
    for keyword in ("BurnedInAnnotation", "RecognizableVisualFeatures"):
        if header.text(ds, keyword).upper() not in ("", "NO"):
            raise NotExportable(f"{keyword} is not NO: the header declares that the image identifies the patient")
    return check_header(image, syntax, ANY_AGE)


def clean_header(ds: Dataset, view: str, key: bytes) -> Dataset:
    """Return a new header with the allowed attributes only; no pixels."""
    sop_class = header.text(ds, "SOPClassUID")
    digital = sop_class in (DIGITAL_XRAY_PRESENTATION, DIGITAL_XRAY_PROCESSING)
    study_uid = header.text(ds, "StudyInstanceUID")
    patient, _ = patient_key(key, header.text(ds, "PatientID"), header.text(ds, "IssuerOfPatientID"), study_uid)
    out = Dataset()
    out.SOPClassUID = sop_class
    for keyword in UIDS:
        # without a series UID, the study UID determines the series
        setattr(out, keyword, export_uid(key, keyword, header.text(ds, keyword) or study_uid))
    out.PatientID = out.PatientName = export_key(key, patient)
    for keyword in EMPTY:
        setattr(out, keyword, "")
    _dates(ds, out, days_back(key, patient))
    _age(ds, out)
    _words(ds, out, digital)
    _numbers(ds, out)
    out.ViewPosition, out.BodyPartExamined = view, "CHEST"
    if digital:
        out.ViewCodeSequence, out.AnatomicRegionSequence = [code_item(*VIEWS[view])], [code_item(*CHEST)]
        out.AcquisitionContextSequence = []
    for keyword in ("ModalityLUTSequence", "VOILUTSequence"):
        if tables := _tables(ds, keyword):
            setattr(out, keyword, tables)
    out.PatientIdentityRemoved, out.LongitudinalTemporalInformationModified = "YES", "MODIFIED"
    out.DeidentificationMethod = METHOD
    out.DeidentificationMethodCodeSequence = [code_item(value, meaning, "DCM") for value, meaning in METHOD_CODES]
    out.file_meta = FileMetaDataset()
    out.file_meta.MediaStorageSOPClassUID = UID(sop_class)
    out.file_meta.MediaStorageSOPInstanceUID = out.SOPInstanceUID
    out.file_meta.TransferSyntaxUID = UID(EXPLICIT_LE)
    out.file_meta.ImplementationClassUID = UID(IMPLEMENTATION_UID)
    out.file_meta.ImplementationVersionName = IMPLEMENTATION_NAME
    return out


def _dates(ds: Dataset, out: Dataset, days: int) -> None:
    """Copy the dates, all moved back by `days`. StudyDate is Type 2; times of day are not copied."""
    out.StudyDate = ""
    for keyword in DATES:
        day = header.day(ds, keyword)
        if day and day.toordinal() > days:
            setattr(out, keyword, f"{date.min + timedelta(day.toordinal() - 1 - days):%Y%m%d}".zfill(8))


def _age(ds: Dataset, out: Dataset) -> None:
    years = header.age_years(ds)
    if years is not None:
        out.PatientAge = f"{min(int(years), OLDEST):03d}Y" if years >= 2 else f"{int(years * 12):03d}M"


def _words(ds: Dataset, out: Dataset, digital: bool) -> None:
    for keyword, allowed in WORDS.items():
        value = header.text(ds, keyword).upper()
        if value in allowed:
            setattr(out, keyword, value)
        elif keyword == "PatientSex" or (digital and keyword in TYPE_2):
            setattr(out, keyword, "")
    kind = [part.upper() for part in header.values(ds, "ImageType")[:2]]
    derived = kind[:1] == ["DERIVED"]
    out.ImageType = ["DERIVED" if derived else "ORIGINAL", "PRIMARY"] + ([""] if digital else [])
    place = header.text(ds, "PatientOrientation").upper()
    out.PatientOrientation = place.split("\\") if re.fullmatch(r"[LRAPHF]{1,3}\\[LRAPHF]{1,3}", place) else ""


def _numbers(ds: Dataset, out: Dataset) -> None:
    for keyword in NUMBERS:
        values = [_number(dictionary_VR(keyword), value) for value in header.values(ds, keyword)]
        if not values or None in values:
            continue
        if "Spacing" not in keyword or all(
            float(value or 0) > 0 for value in values
        ):  # 0 means unknown, and is not valid
            setattr(out, keyword, values)
    signed = header.short(ds, "PixelRepresentation") == 1
    for keyword in SHORTS:
        value = header.short(ds, keyword)
        if value is not None:
            negative = (signed or keyword in SIGNED) and value >= 1 << 15
            vr = "SS" if signed or keyword in SIGNED else "US"
            out.add_new(keyword, vr, value - (1 << 16) if negative else value)


def _number(vr: str, value: str) -> str | None:
    """Return the number in a form valid for its VR (PS3.5 6.2), or None. Some consoles write fractions in IS."""
    number = float(value) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value) else math.inf
    if not math.isfinite(number) or (vr == "IS" and abs(number) >= 1 << 31):
        return None
    if vr == "IS":
        return str(round(number))
    return value if len(value) <= 16 else format_number_as_ds(number)


def _tables(ds: Dataset, keyword: str) -> list[Dataset]:
    """Return the look-up tables (PS3.3 C.11) with descriptor and data only; an explanation is free text."""
    tables = []
    for item in ds[keyword].value if keyword in ds else ():
        descriptor, data = header.shorts(item, "LUTDescriptor"), header.shorts(item, "LUTData")
        if len(descriptor) != 3 or not data:
            continue
        table = Dataset()
        table.add_new("LUTDescriptor", "US", list(descriptor))
        table.add_new("LUTData", "OW", struct.pack(f"<{len(data)}H", *data))
        if keyword == "ModalityLUTSequence":
            kind = header.text(item, "ModalityLUTType").upper()
            table.ModalityLUTType = kind if kind in ("OD", "HU", "US") else "US"
        tables.append(table)
    return tables


def _pixels(out: Dataset, image: Header, syntax: str) -> None:
    """Write the decoded stored values uncompressed, without the bits outside BitsStored."""
    ds = image.with_pixels(syntax)
    stored = decode(ds)
    bits = header.short(ds, "BitsStored") or 16
    out.SamplesPerPixel = 1
    out.Rows, out.Columns = stored.shape
    out.BitsAllocated, out.BitsStored, out.HighBit = (8 if bits <= 8 else 16), bits, bits - 1
    out.PixelRepresentation = int(stored.dtype.kind == "i")
    if syntax in SURELY_LOSSY:  # even if the header does not declare it (PS3.3 C.7.6.1.1.5)
        out.LossyImageCompression = "01"
    data = stored.astype(np.uint8 if bits <= 8 else stored.dtype.newbyteorder("<")).tobytes()
    out.PixelData = data + b"\0" * (len(data) % 2)
    out["PixelData"].VR = "OB" if bits <= 8 else "OW"
