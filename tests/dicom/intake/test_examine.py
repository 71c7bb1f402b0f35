"""Examining one file: facts, hashes, blank and hostile images, memory and time."""

import time
import tracemalloc

import numpy as np
import pytest

from dicom.dataset.facts import HEARTBEAT_ID
from dicom.dataset.syntaxes import JPEG_2000_LOSSLESS
from dicom.intake.examine import examine
from dicom.phantom.wrap import wrap
from dicom.pixels.plate import to_plate
from tests.support.dicom.examining import GROWN_UPS, changed, examined
from tests.support.dicom.pacs import KEY, save, xray

pytestmark = pytest.mark.filterwarnings("ignore:.*VR.*:UserWarning")  # of pydicom, while the tests write invalid values


@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_blank_image_is_rejected(tmp_path, value):
    result = examined(tmp_path, wrap(np.full((96, 96), value, np.uint8), "P1"))
    assert result.outcome == "rejected"
    assert "same value" in result.reason


def test_a_speck_on_a_blank_image_is_still_blank(tmp_path):
    plain = np.full((96, 96), 100, np.uint8)
    plain[5, 5] = 200
    assert examined(tmp_path, wrap(plain, "P1")).outcome == "rejected"


def test_padding_does_not_hide_a_blank_image(tmp_path):
    half = np.full((96, 96), 100, np.uint8)
    half[:, :48] = 0
    ds = wrap(half, "P1")
    ds.PixelPaddingValue = 0
    assert "same value" in examined(tmp_path, ds).reason


def test_the_heartbeat_image_is_admitted_and_marked(tmp_path):
    result = examined(tmp_path, xray(patient_id=HEARTBEAT_ID))
    assert result.outcome == "admitted"
    assert result.image.heartbeat


def test_an_image_without_a_patient_is_not_identified(tmp_path):
    result = examined(tmp_path, changed(PatientID=""))
    assert not result.image.identified
    assert result.image.patient_key.startswith("s")


def test_hostile_names_are_not_in_reasons_or_facts(tmp_path):
    ds = xray(patient_id='=HYPERLINK("x")\\../../etc/passwd')
    ds.PatientName = "../../../../tmp/EVIL^=cmd|' /C calc'!A0"
    result = examined(tmp_path, ds)
    assert result.outcome == "admitted"
    assert "EVIL" not in repr(result)
    assert "passwd" not in repr(result)


def test_a_hostile_value_is_cut_and_printable_in_the_reason(tmp_path):
    ds = changed()
    ds.BodyPartExamined = "KNEE\x1b[31m\nFAKE LOG LINE " + "x" * 200
    reason = examined(tmp_path, ds).reason
    assert reason.isprintable()
    assert len(reason) < 160


def test_a_header_of_60000_by_60000_needs_no_time_or_memory(tmp_path):
    path = save(changed(Rows=60_000, Columns=60_000), tmp_path / "image.dcm")
    tracemalloc.start()
    began = time.perf_counter()
    result = examine(path, KEY, GROWN_UPS)
    seconds, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.outcome == "quarantined"
    assert "60000 x 60000" in result.reason
    assert seconds < 0.5
    assert peak < 4 << 20


def test_a_huge_code_stream_under_a_small_header_is_not_decoded(tmp_path):
    ds = xray(transfer_syntax=JPEG_2000_LOSSLESS)
    stream = bytearray(ds.PixelData)
    at = stream.index(b"\xff\x4f\xff\x51") + 8
    stream[at : at + 8] = (60_000).to_bytes(4) * 2
    ds.PixelData = bytes(stream)
    ds["PixelData"].is_undefined_length = True
    began = time.perf_counter()
    result = examined(tmp_path, ds)
    assert result.outcome == "quarantined"
    assert "60000 x 60000" in result.reason
    assert time.perf_counter() - began < 0.5


def test_the_reason_is_the_first_violated_rule(tmp_path):
    ds = changed(Modality="CT", PatientAge="004Y", Rows=0)
    assert "Modality" in examined(tmp_path, ds).reason


def test_the_plate_of_an_admitted_image_equals_to_plate(tmp_path):
    ds = xray(seed=3, bits=12)
    assert (examined(tmp_path, ds).plate == to_plate(ds)).all()


def test_two_images_of_one_patient_have_one_key_and_two_hashes(tmp_path):
    first, second = examined(tmp_path, xray(seed=1)), examined(tmp_path, xray(seed=2))
    assert first.patient_key == second.patient_key
    assert first.sha256 != second.sha256
    assert first.image.pixel_sha256 != second.image.pixel_sha256
    assert first.sop_uid != second.sop_uid


def test_corrected_demographics_change_sha256_but_not_pixel_sha256(tmp_path):
    ds = xray()
    before = examined(tmp_path, ds)
    ds.PatientID = "P2"
    after = examined(tmp_path, ds)
    assert before.sha256 != after.sha256
    assert before.image.pixel_sha256 == after.image.pixel_sha256
    assert before.sop_uid == after.sop_uid


def test_the_hash_does_not_depend_on_the_file_meta(tmp_path):
    ds = xray()
    before = examined(tmp_path, ds)
    ds.file_meta.ImplementationVersionName = "ANOTHER"
    ds.file_meta.SourceApplicationEntityTitle = "SOMEONE"
    assert examined(tmp_path, ds).sha256 == before.sha256
