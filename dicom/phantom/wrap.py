"""Convert a picture (PNG, JPEG or array) to a DICOM data set; for imports, the demo's PACS and tests.

Deterministic: the same picture of the same patient always gets the same SOP Instance UID. Writes no file.
"""

import hashlib
from pathlib import Path

import imagecodecs
import numpy as np
from PIL import Image as Picture
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, generate_uid

from dicom.dataset.chest_codes import CHEST, VIEWS, code_item
from dicom.dataset.facts import COMPUTED_RADIOGRAPHY, DIGITAL_XRAY_PRESENTATION, SECONDARY_CAPTURE
from dicom.dataset.part10 import EXPLICIT_LE, IMPLEMENTATION_UID, NATIVE
from dicom.dataset.syntaxes import JPEG_2000_LOSSLESS, JPEG_LS

WRAPPER = "cxrloop wrap"  # ManufacturerModelName; differs from that of our results, which admission rejects
IMAGE_MM = 350  # the width of a common chest cassette
CLASS_OF = {"DX": DIGITAL_XRAY_PRESENTATION, "CR": COMPUTED_RADIOGRAPHY}  # any other modality: Secondary Capture


def wrap(
    source: Path | np.ndarray,
    patient_id: str,
    view: str = "PA",
    study_date: str | None = None,
    sex: str | None = None,
    age_years: float | None = None,
    photometric: str = "MONOCHROME2",
    transfer_syntax: str = EXPLICIT_LE,
    body_part: str = "CHEST",
    modality: str = "DX",
    bits: int | None = None,
    sop_uid: str | None = None,
    study_uid: str | None = None,
) -> Dataset:
    """Return a data set for `source`: a picture file, or a uint8 or uint16 [H, W] array (brighter is denser).

    `study_date` is YYYYMMDD. `bits` are BitsStored, by default 8, 12 or 16 depending on the source. MONOCHROME1 is
    stored inverted. Syntaxes: the native ones, JPEG 2000 lossless, JPEG-LS. Raises ValueError, OSError.
    """
    grey = read_grey(source) if isinstance(source, Path) else np.ascontiguousarray(source)
    if grey.ndim != 2 or grey.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{grey.dtype} {grey.shape}: an image is uint8 or uint16 [H, W]")
    bits = bits or (8 if grey.dtype == np.uint8 else 12 if grey.max(initial=0) < 4096 else 16)
    if int(grey.max(initial=0)) >> bits:
        raise ValueError(f"values up to {grey.max()} do not fit {bits} bits")
    stored = ((1 << bits) - 1 - grey if photometric == "MONOCHROME1" else grey).astype(grey.dtype)

    content = hashlib.sha256(f"{stored.dtype}{stored.shape}{photometric}{view}".encode() + stored.tobytes()).hexdigest()
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID = CLASS_OF.get(modality, SECONDARY_CAPTURE)
    ds.SOPInstanceUID = sop_uid or generate_uid(entropy_srcs=["image", patient_id, content])
    ds.StudyInstanceUID = study_uid or generate_uid(entropy_srcs=["study", patient_id, study_date or "", content])
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=["series", str(ds.StudyInstanceUID)])
    _patient(ds, patient_id, sex, age_years)
    ds.StudyID, ds.SeriesNumber, ds.InstanceNumber, ds.AccessionNumber = "1", 1, 1, ""
    ds.StudyDate, ds.StudyTime = study_date or "", ""
    ds.ReferringPhysicianName = ""
    ds.Manufacturer, ds.ManufacturerModelName = "cxrloop", WRAPPER
    _series(ds, modality, body_part, view)
    _pixels(ds, stored, bits, photometric, transfer_syntax)
    return ds


def _patient(ds: Dataset, patient_id: str, sex: str | None, age_years: float | None) -> None:
    ds.PatientID, ds.PatientName, ds.PatientBirthDate, ds.PatientSex = patient_id, "", "", sex or ""
    if age_years is not None:
        ds.PatientAge = f"{int(age_years):03d}Y" if age_years >= 2 else f"{int(age_years * 12):03d}M"


def _series(ds: Dataset, modality: str, body_part: str, view: str) -> None:
    ds.Modality, ds.BodyPartExamined, ds.ViewPosition = modality, body_part, view
    ds.ImageType = ["ORIGINAL", "PRIMARY"]
    ds.PatientOrientation = ["P", "F"] if view in ("LL", "RL") else ["L", "F"]
    if ds.SOPClassUID == SECONDARY_CAPTURE:
        ds.ConversionType = "WSD"
    if modality == "DX":
        ds.AnatomicRegionSequence = [code_item(*CHEST)] if body_part == "CHEST" else []
        ds.ViewCodeSequence = [code_item(*VIEWS[view])] if view in VIEWS else []
        ds.AcquisitionContextSequence = []
        ds.ImageLaterality, ds.DetectorType, ds.PositionerType = "U", "", ""
        ds.PresentationIntentType = "FOR PRESENTATION"
        ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign = "LOG", -1
        ds.BurnedInAnnotation, ds.LossyImageCompression = "NO", "00"
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "US"


def _pixels(ds: Dataset, stored: np.ndarray, bits: int, photometric: str, syntax: str) -> None:
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, photometric
    ds.Rows, ds.Columns = stored.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8 * stored.dtype.itemsize, bits, bits - 1, 0
    if ds.Modality == "DX":
        # required in a DX object; a picture has no spacing, so assume that the image is IMAGE_MM wide
        ds.ImagerPixelSpacing = [f"{IMAGE_MM / stored.shape[1]:.5f}"] * 2
        ds.PresentationLUTShape = "INVERSE" if photometric == "MONOCHROME1" else "IDENTITY"
    # a window over the full range, so that the plate looks like the picture
    ds.WindowCenter, ds.WindowWidth = str(1 << bits - 1), str(1 << bits)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = UID(syntax)
    ds.file_meta.ImplementationClassUID = UID(IMPLEMENTATION_UID)
    if syntax in NATIVE:
        big = not UID(syntax).is_little_endian
        data = stored.astype(stored.dtype.newbyteorder(">" if big else "<")).tobytes()
        ds.PixelData = data + b"\0" * (len(data) % 2)
        ds["PixelData"].VR = "OB" if stored.dtype == np.uint8 else "OW"
    elif syntax == JPEG_2000_LOSSLESS:
        stream = imagecodecs.jpeg2k_encode(stored, codecformat="j2k", reversible=True, level=0, bitspersample=bits)
        _encapsulate(ds, stream)
    elif syntax == JPEG_LS:
        _encapsulate(ds, imagecodecs.jpegls_encode(stored))
    else:
        raise ValueError(f"transfer syntax {syntax}: wrap writes only the native ones, JPEG 2000 lossless and JPEG-LS")


def _encapsulate(ds: Dataset, stream: bytes | bytearray) -> None:
    ds.PixelData = encapsulate([bytes(stream)])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True


def read_grey(path: Path) -> np.ndarray:
    """Return a PNG or JPEG as uint8 or uint16 [H, W]; colours and palettes become grey, transparency becomes black.

    Raises OSError, and ValueError for a damaged or far too large picture.
    """
    try:
        with Picture.open(path) as picture:
            return _grey(picture)
    except (Picture.DecompressionBombError, SyntaxError) as error:  # Pillow raises SyntaxError for a damaged PNG
        raise ValueError(str(error)) from None


def _grey(picture: Picture.Image) -> np.ndarray:
    if picture.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        return np.clip(np.asarray(picture), 0, 0xFFFF).astype(np.uint16)
    if picture.mode in ("LA", "RGBA", "PA") or "transparency" in picture.info:
        coloured = picture.convert("RGBA")
        black = Picture.new("RGBA", coloured.size, (0, 0, 0, 255))
        return np.asarray(Picture.alpha_composite(black, coloured).convert("L"))
    return np.asarray(picture if picture.mode == "L" else picture.convert("RGB").convert("L"))
