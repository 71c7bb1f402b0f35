"""Pictures as DICOM: deterministic, readable by pydicom, and one plate in every encoding."""

import numpy as np
import pytest
from PIL import Image as Picture
from pydicom import dcmread

from dicom.dataset.facts import COMPUTED_RADIOGRAPHY, DIGITAL_XRAY_PRESENTATION, SECONDARY_CAPTURE
from dicom.dataset.part10 import DEFLATED_LE, EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE
from dicom.dataset.syntaxes import JPEG_2000_LOSSLESS, JPEG_LS
from dicom.intake.examine import Admission, examine
from dicom.phantom.wrap import read_grey, wrap
from dicom.pixels.plate import to_plate
from tests.support.dicom.pacs import KEY, chest, save


def test_wrapping_twice_is_the_same_image_and_another_patient_another():
    first, again, other_patient = wrap(chest(), "P1"), wrap(chest(), "P1"), wrap(chest(), "P2")
    assert first.SOPInstanceUID == again.SOPInstanceUID
    assert first.StudyInstanceUID == again.StudyInstanceUID
    assert first.SOPInstanceUID != other_patient.SOPInstanceUID
    assert wrap(chest(seed=1), "P1").SOPInstanceUID != first.SOPInstanceUID


def test_the_same_image_in_another_syntax_keeps_its_uid():
    assert wrap(chest(), "P1").SOPInstanceUID == wrap(chest(), "P1", transfer_syntax=JPEG_LS).SOPInstanceUID


@pytest.mark.parametrize("syntax", [EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE, DEFLATED_LE, JPEG_LS, JPEG_2000_LOSSLESS])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_pydicom_reads_back_what_was_wrapped(tmp_path, syntax, photometric, bits):
    pixels = chest(96, 0, bits)
    ds = wrap(pixels, "P1", photometric=photometric, transfer_syntax=syntax, bits=bits)
    read = dcmread(save(ds, tmp_path / "image.dcm"))
    expected = (1 << bits) - 1 - pixels if photometric == "MONOCHROME1" else pixels
    assert (read.pixel_array == expected).all()
    assert (to_plate(read) == to_plate(wrap(pixels, "P1", bits=bits))).all()


def test_a_wrapped_image_of_the_size_of_a_plate_is_unchanged():
    pixels = chest(512, 3)
    assert (to_plate(wrap(pixels, "P1")) == pixels).all()


@pytest.mark.parametrize(
    ("modality", "sop_class"),
    [("DX", DIGITAL_XRAY_PRESENTATION), ("CR", COMPUTED_RADIOGRAPHY), ("OT", SECONDARY_CAPTURE)],
)
def test_the_class_follows_the_modality(modality, sop_class):
    assert wrap(chest(), "P1", modality=modality).SOPClassUID == sop_class


def test_laterals_and_other_body_parts_can_be_made_and_are_not_admitted(tmp_path):
    lateral = save(wrap(chest(), "P1", "LL"), tmp_path / "lateral.dcm")
    hip = save(wrap(chest(), "P1", body_part="HIP"), tmp_path / "hip.dcm")
    assert examine(lateral, KEY, Admission()).outcome == "rejected"
    assert examine(hip, KEY, Admission()).outcome == "rejected"


@pytest.mark.parametrize(("age", "text"), [(54, "054Y"), (2, "002Y"), (0.5, "006M"), (101.4, "101Y")])
def test_ages(age, text):
    assert wrap(chest(), "P1", age_years=age).PatientAge == text


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "1", "I;16"])
def test_pictures_of_every_mode_become_grey(tmp_path, mode):
    grey, path = chest(80), tmp_path / "image.png"
    if mode == "I;16":
        Picture.fromarray(grey.astype(np.uint16) * 257).save(path)
    else:
        Picture.fromarray(grey).convert(mode).save(path)
    grey_read = read_grey(path)
    assert grey_read.shape == (80, 80)
    if mode == "I;16":
        assert (grey_read == grey.astype(np.uint16) * 257).all()
    elif mode != "1":
        assert np.abs(grey_read.astype(int) - grey).max() <= 1
    assert examine(save(wrap(path, "P1"), tmp_path / "image.dcm"), KEY, Admission()).outcome == "admitted"


def test_a_jpeg_is_read(tmp_path):
    path = tmp_path / "image.jpeg"
    Picture.fromarray(chest(80)).save(path, quality=95)
    assert np.abs(read_grey(path).astype(int) - chest(80)).max() < 16


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.float32), np.zeros(4, np.uint8)])
def test_an_array_that_is_not_a_grey_picture_is_refused(array):
    with pytest.raises(ValueError, match="an image is uint8 or uint16"):
        wrap(array, "P1")


def test_values_beyond_the_bits_are_refused():
    with pytest.raises(ValueError, match="do not fit 12 bits"):
        wrap(np.full((8, 8), 5000, np.uint16), "P1", bits=12)
    assert wrap(np.full((8, 8), 4000, np.uint16), "P1").BitsStored == 12
    assert wrap(np.full((8, 8), 5000, np.uint16), "P1").BitsStored == 16


def test_a_file_that_is_not_a_picture_raises_os_error(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"no picture")
    with pytest.raises(OSError):
        wrap(path, "P1")
