"""The heatmap of a scored image as a Secondary Capture: panels with captions burned in, in the image's own study.

The panels come drawn; this adds what they mean and what they must not be used for. Knows no model and no network.
"""

from collections.abc import Sequence

import numpy as np
from highdicom.sc import SCImage
from highdicom.sr import CodedConcept
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from dicom.dataset import header
from dicom.outgoing.results import NOTICE, SERIES_NUMBERS, SYNTAX, Score, Scored, finish, reference

SIDE = 512  # pixels of a panel: a plate
STRIP = 40  # pixels under a panel for its caption, and under all panels for the notice
LETTERS = 18  # pixels: readable where a workstation fits the sheet into a quarter of a screen
LARGEST_VALUE = 10240  # characters of LT (PS3.5 6.2)


def capture(image: Dataset, said: Scored, panels: Sequence[tuple[Score, np.ndarray]]) -> Dataset:
    """A Secondary Capture (PS3.3 A.8.1), RGB, of panels uint8 [512, 512, 3] side by side; raises HeaderIncomplete."""
    source = reference(image)
    result = SCImage(
        pixel_array=sheet(panels, said),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),
        study_instance_uid=source.StudyInstanceUID,
        series_instance_uid=said.uid("sc", "series"),
        series_number=SERIES_NUMBERS["sc"],
        sop_instance_uid=said.uid("sc"),
        instance_number=1,
        manufacturer="cxrloop",
        patient_birth_date="",
        transfer_syntax_uid=SYNTAX,
        series_description=f"cxrloop heatmap: {NOTICE.lower()}",
    )
    # as the image has it: the plate is not turned; empty where unknown (type 2C)
    result.add_new("PatientOrientation", "CS", _orientation(image))
    result.ConversionType = "SYN"  # a synthetic image (PS3.3 C.8.6.1)
    result.BodyPartExamined = "CHEST"
    burned = header.text(image, "BurnedInAnnotation")
    if burned in ("YES", "NO"):  # the image's own letters are in the plate; ours name no one
        result.BurnedInAnnotation = burned
    if header.text(image, "LossyImageCompression") == "01":  # once lossy, always (PS3.3 C.7.6.1.1.5)
        result.LossyImageCompression = "01"
    result.DerivationDescription = f"Heatmap of cxrloop {said.version}, model bundle {said.bundle}. {NOTICE}."
    result.ImageComments = _comments(said)[:LARGEST_VALUE]
    result.SourceImageSequence = [_source(source)]
    finish(result, image, said)
    result.DateOfSecondaryCapture, result.TimeOfSecondaryCapture = result.ContentDate, result.ContentTime
    return result


def sheet(panels: Sequence[tuple[Score, np.ndarray]], said: Scored) -> np.ndarray:
    """uint8 [H, W, 3]: panels in rows of two, finding, probability and threshold under each, bundle and notice below."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    page = Image.new("RGB", (SIDE * columns, (SIDE + STRIP) * rows + 2 * STRIP))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(LETTERS)
    for number, (score, pixels) in enumerate(panels):
        x, y = SIDE * (number % columns), (SIDE + STRIP) * (number // columns)
        page.paste(Image.fromarray(pixels), (x, y))
        figures = f" {score.probability:.2f}  (threshold {score.threshold:.2f})"
        _line(pen, font, x, y + SIDE, score.finding, end=figures)
    end = (SIDE + STRIP) * rows
    _line(pen, font, 0, end, f"cxrloop: {NOTICE}", "yellow")
    _line(pen, font, 0, end + STRIP, f"model bundle {said.bundle}; red speaks for the finding")
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
    while pen.textlength(words + end, font) > SIDE - 16:  # a finding's name may have 64 letters; its figures stay
        words = words[:-4] + "..."
    pen.text((x + 8, y + (STRIP - LETTERS) // 2), words + end, ink, font)


def _orientation(image: Dataset) -> list[str] | str:
    rows = header.values(image, "PatientOrientation")
    known = {"A", "P", "R", "L", "H", "F"}
    return list(rows) if len(rows) == 2 and all(set(one) <= known and 0 < len(one) <= 3 for one in rows) else ""


def _source(source: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    item.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(codes.DCM.SourceImageForImageProcessingOperation)]
    return item


def _comments(said: Scored) -> str:
    lines = (f"{s.finding}: probability {s.probability:.4f}, threshold {s.threshold:.4f}" for s in said.scores)
    return "\r\n".join((NOTICE, f"model bundle {said.bundle}", *lines))
