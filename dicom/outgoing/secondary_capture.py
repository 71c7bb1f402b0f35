"""The heatmap of a scored image as a Secondary Capture: panels with burned-in captions, in the image's own study.

The caller draws the panels; this module adds captions and the notice. Must not import a model or the network.
"""

from collections.abc import Sequence

import numpy as np
from highdicom.sc import SCImage
from highdicom.sr import CodedConcept
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from cxrloop.plate import PLATE_SIDE
from dicom.dataset import header
from dicom.outgoing.results import NOTICE, SERIES_NUMBERS, SYNTAX, Score, Scored, finish, reference

STRIP = 40  # height in pixels of a caption under a panel, and of a line of the notice
LETTERS = 18  # font size in pixels: readable when a workstation shows the sheet in a quarter of its screen
LARGEST_VALUE = 10240  # characters of LT (PS3.5 6.2)


def capture(image: Dataset, scored: Scored, panels: Sequence[tuple[Score, np.ndarray]]) -> Dataset:
    """Return a Secondary Capture (PS3.3 A.8.1), RGB, of panels uint8 [512, 512, 3]. Raises HeaderIncomplete."""
    source = reference(image)
    result = SCImage(
        pixel_array=sheet(panels, scored),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),
        study_instance_uid=source.StudyInstanceUID,
        series_instance_uid=scored.uid("sc", "series"),
        series_number=SERIES_NUMBERS["sc"],
        sop_instance_uid=scored.uid("sc"),
        instance_number=1,
        manufacturer="cxrloop",
        patient_birth_date="",
        transfer_syntax_uid=SYNTAX,
        series_description=f"cxrloop heatmap: {NOTICE.lower()}",
    )
    # the image's: the plate is not rotated; empty if unknown (type 2C)
    result.add_new("PatientOrientation", "CS", _orientation(image))
    result.ConversionType = "SYN"  # synthetic image (PS3.3 C.8.6.1)
    result.BodyPartExamined = "CHEST"
    burned = header.text(image, "BurnedInAnnotation")
    if burned in ("YES", "NO"):  # the plate shows the image's burned-in text; our captions identify nobody
        result.BurnedInAnnotation = burned
    if (
        header.text(image, "LossyImageCompression") == "01"
    ):  # an image that was lossy once stays lossy (PS3.3 C.7.6.1.1.5)
        result.LossyImageCompression = "01"
    result.DerivationDescription = f"Heatmap of cxrloop {scored.version}, model bundle {scored.bundle}. {NOTICE}."
    result.ImageComments = _comments(scored)[:LARGEST_VALUE]
    result.SourceImageSequence = [_source(source)]
    finish(result, image, scored)
    result.DateOfSecondaryCapture, result.TimeOfSecondaryCapture = result.ContentDate, result.ContentTime
    return result


def sheet(panels: Sequence[tuple[Score, np.ndarray]], scored: Scored) -> np.ndarray:
    """Return uint8 [H, W, 3]: panels in rows of two, finding, probability and threshold under each; then the notice."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    page = Image.new("RGB", (PLATE_SIDE * columns, (PLATE_SIDE + STRIP) * rows + 2 * STRIP))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(LETTERS)
    for number, (score, pixels) in enumerate(panels):
        x, y = PLATE_SIDE * (number % columns), (PLATE_SIDE + STRIP) * (number // columns)
        page.paste(Image.fromarray(pixels), (x, y))
        figures = f" {score.probability:.2f}  (threshold {score.threshold:.2f})"
        _line(pen, font, x, y + PLATE_SIDE, score.finding, end=figures)
    end = (PLATE_SIDE + STRIP) * rows
    _line(pen, font, 0, end, f"cxrloop: {NOTICE}", "yellow")
    _line(pen, font, 0, end + STRIP, f"model bundle {scored.bundle}; red: evidence for the finding")
    return np.asarray(page)


def _line(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    x: int,
    y: int,
    words: str,
    ink: str = "white",
    end: str = "",
) -> None:
    while (
        pen.textlength(words + end, font) > PLATE_SIDE - 16
    ):  # a finding's name may have 64 letters; shorten the name, never the figures
        words = words[:-4] + "..."
    pen.text((x + 8, y + (STRIP - LETTERS) // 2), words + end, ink, font)


def _orientation(image: Dataset) -> list[str] | str:
    rows = header.values(image, "PatientOrientation")
    letters = {"A", "P", "R", "L", "H", "F"}
    valid = len(rows) == 2 and all(set(row) <= letters and 0 < len(row) <= 3 for row in rows)
    return list(rows) if valid else ""


def _source(source: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    item.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(codes.DCM.SourceImageForImageProcessingOperation)]
    return item


def _comments(scored: Scored) -> str:
    lines = (f"{s.finding}: probability {s.probability:.4f}, threshold {s.threshold:.4f}" for s in scored.scores)
    return "\r\n".join((NOTICE, f"model bundle {scored.bundle}", *lines))
