"""Admission: every rule, with real files through `examine`."""

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from dicom.dataset.facts import DIGITAL_XRAY_PROCESSING, RESULT_UID_ROOT, SECONDARY_CAPTURE
from dicom.dataset.part10 import content_sha256
from dicom.dataset.syntaxes import JPEG_LS
from dicom.intake.examine import Admission, examine
from tests.support.dicom.examining import EVERYONE, GROWN_UPS, changed, examined
from tests.support.dicom.pacs import KEY, save, xray

pytestmark = pytest.mark.filterwarnings("ignore:.*VR.*:UserWarning")  # of pydicom, while the tests write invalid values


def code(value):
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SCT", "a code"
    return Sequence([item])


def test_a_chest_image_is_admitted_with_its_facts(tmp_path):
    ds = xray(patient_id="12345", sex="F", age_years=54, study_date="20260211")
    ds.StudyTime, ds.Manufacturer, ds.PatientName = "101112.5", "ACME", "DOE^JANE"
    result = examined(tmp_path, ds)
    assert (result.outcome, result.reason) == ("admitted", None)
    image = result.image
    assert (image.sop_uid, image.study_uid) == (ds.SOPInstanceUID, ds.StudyInstanceUID)
    assert (image.view, image.sex, image.age_years, image.identified) == ("PA", "F", 54, True)
    assert (image.rows, image.columns, image.photometric) == (96, 96, "MONOCHROME2")
    assert image.acquired_at == "2026-02-11T10:11:12"
    assert image.scanner == "ACME cxrloop wrap"
    assert image.sha256 == result.sha256 == content_sha256(tmp_path / "image.dcm")
    assert not image.heartbeat
    assert "12345" not in repr(image)
    assert "DOE" not in repr(image)
    assert result.plate.shape == (512, 512)
    assert result.plate.dtype == np.uint8


ADMITTED = {
    "AP": {"ViewPosition": "AP"},
    "view in words": {"ViewPosition": "POSTERO_ANTERIOR"},
    "AP supine": {"ViewPosition": "AP SUPINE"},
    "view in PatientPosition": {"ViewPosition": "", "PatientPosition": "AP"},
    "view in PatientOrientation": {"ViewPosition": "", "PatientOrientation": "PA"},
    "view code": {"ViewPosition": "", "ViewCodeSequence": code("272479007")},
    "old view code": {"ViewPosition": None, "ViewCodeSequence": code("R-10206")},
    "thorax": {"BodyPartExamined": "THORAX"},
    "lung, in small letters": {"BodyPartExamined": "lung"},
    "chest PA": {"BodyPartExamined": "CHEST PA"},
    "no body part": {"BodyPartExamined": ""},
    "no body part, a chest region": {"BodyPartExamined": None, "AnatomicRegionSequence": code("51185008")},
    "computed radiography": {"Modality": "CR"},
    "for processing": {"SOPClassUID": DIGITAL_XRAY_PROCESSING},
    "secondary capture of a DX": {"SOPClassUID": SECONDARY_CAPTURE},
    "secondary capture without image type": {"SOPClassUID": SECONDARY_CAPTURE, "ImageType": None},
    "derived primary, as real CR images are": {"ImageType": ["DERIVED", "PRIMARY"]},
    "derived only, as after a lossy transcoding": {"ImageType": "DERIVED"},
    "one frame, said so": {"NumberOfFrames": 1},
    "grown up": {"PatientAge": "018Y"},
    "age in bare years": {"PatientAge": "81"},
    "age not known to the console": {"PatientAge": "000Y"},
    "age that makes no sense": {"PatientAge": "old"},
    "no patient id": {"PatientID": ""},
    "wrapped by us": {"ManufacturerModelName": "cxrloop wrap"},
}


@pytest.mark.parametrize("name", ADMITTED)
def test_admitted(tmp_path, name):
    result = examined(tmp_path, changed(**ADMITTED[name]))
    assert (result.outcome, result.reason) == ("admitted", None)
    assert result.image.view in ("PA", "AP")


REJECTED = {
    "not a chest modality": ({"Modality": "MG"}, "Modality (0008,0060) = MG"),
    "mammography class": ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.2"}, "SOPClassUID (0008,0016) = 1.2.840"),
    "another body part": ({"BodyPartExamined": "RIBCAGE"}, "BodyPartExamined (0018,0015) = RIBCAGE"),
    "chest and more": ({"BodyPartExamined": "CHEST ABDOMEN"}, "BodyPartExamined (0018,0015) = CHEST ABDOMEN"),
    "another region": (
        {"BodyPartExamined": "", "AnatomicRegionSequence": code("72696002")},
        "AnatomicRegionSequence (0008,2218) = 72696002",
    ),
    "left lateral": ({"ViewPosition": "LL"}, "ViewPosition (0018,5101) = LL"),
    "lateral in words": ({"ViewPosition": "LATERAL"}, "ViewPosition (0018,5101) = LATERAL"),
    "oblique": ({"ViewPosition": "RAO"}, "ViewPosition (0018,5101) = RAO"),
    "PA and lateral": ({"ViewPosition": "PA LAT"}, "ViewPosition (0018,5101) = PA LAT"),
    "lateral by code": ({"ViewPosition": "", "ViewCodeSequence": code("399173006")}, "ViewCodeSequence (0054,0220)"),
    "lateral by orientation": (
        {"ViewPosition": "", "PatientOrientation": ["A", "F"]},
        "PatientOrientation (0020,0020)",
    ),
    "lateral that says PA": ({"PatientOrientation": ["P", "F"]}, "although ViewPosition is PA"),
    "no view": ({"ViewPosition": ""}, "view unknown"),
    "no view, odd position": (
        {"ViewPosition": None, "PatientPosition": "XX"},
        "view unknown: ViewPosition (0018,5101) is empty and PatientPosition (0018,5100) = XX",
    ),
    "several frames": ({"NumberOfFrames": 2}, "NumberOfFrames (0028,0008) = 2"),
    "colour": ({"PhotometricInterpretation": "RGB"}, "PhotometricInterpretation (0028,0004) = RGB"),
    "palette": (
        {"PhotometricInterpretation": "PALETTE COLOR"},
        "PhotometricInterpretation (0028,0004) = PALETTE COLOR",
    ),
    "three samples": ({"SamplesPerPixel": 3}, "SamplesPerPixel (0028,0002) = 3"),
    "32 bits": ({"BitsAllocated": 32}, "BitsAllocated (0028,0100) = 32"),
    "a child": ({"PatientAge": "017Y"}, "PatientAge (0010,1010) = 017Y: under 18"),
    "a baby": ({"PatientAge": "003M"}, "PatientAge (0010,1010) = 003M: under 18"),
    "a child by its birthday": (
        {"PatientAge": None, "PatientBirthDate": "20200101", "StudyDate": "20260101"},
        "PatientBirthDate (0010,0030) to StudyDate = 6 years: under 18",
    ),
    "our own UID": ({"SOPInstanceUID": RESULT_UID_ROOT + "1.2.3"}, "one of our own results"),
    "our own device": ({"ManufacturerModelName": "CXRLoop"}, "one of our own results"),
    "a screenshot": (
        {"SOPClassUID": SECONDARY_CAPTURE, "ImageType": ["DERIVED", "SECONDARY"]},
        "ImageType (0008,0008)",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_with_tag_and_value(tmp_path, name):
    values, reason = REJECTED[name]
    result = examined(tmp_path, changed(**values))
    assert result.outcome == "rejected"
    assert reason in result.reason
    assert result.image is None
    assert result.plate is None
    assert result.patient_key
    assert result.sop_uid


QUARANTINED = {
    "no SOP instance UID": ({"SOPInstanceUID": ""}, "SOPInstanceUID (0008,0018)"),
    "path as UID": ({"SOPInstanceUID": "../../../tmp/x"}, "SOPInstanceUID (0008,0018) = ../../../tmp/x"),
    "no SOP class": ({"SOPClassUID": ""}, "SOPClassUID (0008,0016)"),
    "no study": ({"StudyInstanceUID": ""}, "StudyInstanceUID (0020,000D)"),
    "no pixels": ({"PixelData": None}, "PixelData (7FE0,0010) is missing"),
    "unknown photometric": ({"PhotometricInterpretation": "MONOCHROME9"}, "MONOCHROME9"),
    "no rows": ({"Rows": 0}, "Rows (0028,0010)"),
    "too few bytes": ({"Rows": 97}, "PixelData (7FE0,0010) has 9216 bytes, 97 x 96 needs 9312"),
    "too many bytes": ({"Rows": 90}, "PixelData (7FE0,0010) has 9216 bytes, 90 x 96 needs 8640"),
    "more bits than allocated": ({"BitsStored": 12}, "BitsStored (0028,0101) = 12"),
    "high bit below the stored": ({"HighBit": 5}, "HighBit (0028,0102) = 5"),
    "slope of nothing": ({"RescaleSlope": "0"}, "RescaleSlope (0028,1053) = 0"),
}


@pytest.mark.parametrize("name", QUARANTINED)
def test_quarantined_with_tag_and_value(tmp_path, name):
    values, reason = QUARANTINED[name]
    result = examined(tmp_path, changed(**values))
    assert result.outcome == "quarantined"
    assert reason in result.reason


def test_native_pixels_under_a_compressed_syntax_are_quarantined(tmp_path):
    path = save(xray(), tmp_path / "image.dcm")
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"))
    result = examine(path, KEY, GROWN_UPS)
    assert result.outcome == "quarantined"
    assert "not encapsulated" in result.reason


def test_a_syntax_that_we_do_not_decode_is_rejected(tmp_path):
    path = save(xray(transfer_syntax=JPEG_LS), tmp_path / "image.dcm")
    mpeg2 = b"1.2.840.10008.1.2.4.100"
    path.write_bytes(path.read_bytes().replace(b"\x16\0" + JPEG_LS.encode(), b"\x18\0" + mpeg2 + b"\0"))
    result = examine(path, KEY, GROWN_UPS)
    assert result.outcome == "rejected"
    assert "TransferSyntaxUID (0002,0010) = 1.2.840.10008.1.2.4.100" in result.reason


def test_children_are_admitted_if_the_site_allows_it(tmp_path):
    assert examined(tmp_path, changed(PatientAge="006Y"), EVERYONE).outcome == "admitted"
    assert examined(tmp_path, changed(PatientAge="006Y"), EVERYONE).image.age_years == 6


def test_a_tiny_image_is_rejected_by_the_limit_of_the_site(tmp_path):
    ds = xray(side=63)
    assert "63 x 63: shorter side under 64 pixels" in examined(tmp_path, ds).reason
    assert examined(tmp_path, ds, Admission(min_side=32)).outcome == "admitted"
