"""De-identified copies: allowed attributes only, a new identity, the same pixels."""

import io
import subprocess
from datetime import date

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from dicom.dataset.part10 import DEFLATED_LE, EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE
from dicom.dataset.syntaxes import JPEG_2000_LOSSLESS, JPEG_BASELINE, JPEG_LS
from dicom.errors import NotExportable
from dicom.outgoing.deidentify import deidentify
from dicom.pixels.plate import decode, to_plate
from tests.support.dicom.pacs import KEY, save, xray

SECRETS = (
    "MUELLER", "HANNELORE", "PAT-4711", "ST.ELSEWHERE", "ACC-99812", "DR-GRANT", "19410307", "20240229", "131415",
    "hip pain since", "SN-5550123", "1.2.276.0.7230010.3.1.4", "REQUESTED-BY", "secret.blob", "curve-label", "LUTNOTE",
    "overlay-note", "SOUTHWARD", "CTX-NAME", "OPERATOR-X",
)  # fmt: skip
KEPT = {
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "StudyDate", "SeriesDate",
    "AcquisitionDate", "ContentDate", "StudyTime", "AccessionNumber", "Modality", "PresentationIntentType", "ImageType",
    "Manufacturer", "ReferringPhysicianName", "AnatomicRegionSequence", "PatientName", "PatientID", "PatientBirthDate",
    "PatientSex", "PatientAge", "PatientIdentityRemoved", "DeidentificationMethod", "DeidentificationMethodCodeSequence",
    "BodyPartExamined", "KVP", "ImagerPixelSpacing", "ViewPosition", "DetectorType", "PositionerType", "StudyID",
    "SeriesNumber", "InstanceNumber", "PatientOrientation", "ImageLaterality", "SamplesPerPixel", "Rows", "Columns",
    "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "BurnedInAnnotation",
    "LongitudinalTemporalInformationModified", "PixelIntensityRelationship", "PixelIntensityRelationshipSign",
    "WindowCenter", "WindowWidth", "RescaleIntercept", "RescaleSlope", "RescaleType", "LossyImageCompression",
    "VOILUTSequence", "AcquisitionContextSequence", "ViewCodeSequence", "PresentationLUTShape", "PixelData",
}  # fmt: skip


def rich(seed: int = 1, **more: object) -> Dataset:
    """Return an image with the patient's identity in every kind of element."""
    ds = xray(seed, patient_id="PAT-4711", study_date="20240229", sex="F", **more)  # type: ignore[arg-type]
    ds.PatientName, ds.OtherPatientNames, ds.PatientBirthDate = "MUELLER^HANNELORE", "MUELLER^H", "19410307"
    ds.IssuerOfPatientID, ds.AccessionNumber, ds.StudyID = "ST.ELSEWHERE", "ACC-99812", "ACC-99812"
    ds.ReferringPhysicianName, ds.OperatorsName, ds.InstitutionName = "DR-GRANT", "OPERATOR-X", "ST.ELSEWHERE"
    ds.StudyTime = ds.ContentTime = ds.AcquisitionTime = "131415.123"
    ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = "20240229"
    ds.AcquisitionDateTime, ds.InstanceCreationDate = "20240229131415", "20240229"
    ds.StudyDescription, ds.PatientComments = "hip pain since 20240229", "MUELLER hip pain since"
    ds.ImageComments, ds.DeviceSerialNumber, ds.StationName = "MUELLER", "SN-5550123", "SOUTHWARD"
    ds.Manufacturer = ds.ManufacturerModelName = "SOUTHWARD"
    ds.StudyInstanceUID, ds.SOPInstanceUID = "1.2.276.0.7230010.3.1.4.2", f"1.2.276.0.7230010.3.1.4.1.{seed}"
    ds.SeriesInstanceUID = ds.FrameOfReferenceUID = "1.2.276.0.7230010.3.1.4.3"
    ds.KVP, ds.SeriesNumber, ds.InstanceNumber = "125", "4711", "131415"
    second = Dataset()
    second.PatientID, second.PatientName, second.ReferencedSOPInstanceUID = (
        "PAT-4711",
        "MUELLER",
        "1.2.276.0.7230010.3.1.4.9",
    )
    nested = Dataset()
    nested.PersonName, nested.ScheduledProcedureStepDescription = "DR-GRANT", "REQUESTED-BY DR-GRANT"
    nested.ReferencedPatientSequence = [second]
    ds.RequestAttributesSequence, ds.ReferencedStudySequence = [nested], [second]
    ds.OtherPatientIDsSequence, ds.ContentSequence = [second], [nested]
    icon = Dataset()
    icon.ImageComments = "MUELLER"
    icon.add_new("PixelData", "OB", b"secret.blob ")
    ds.IconImageSequence = [icon]
    name = Dataset()
    name.TextValue = "CTX-NAME"
    ds.AcquisitionContextSequence = [name]
    for group in (0x0009, 0x0029, 0x7FD1):
        block = ds.private_block(group, "ACME MUELLER", create=True)
        block.add_new(0x01, "LO", "PAT-4711")
        block.add_new(0x02, "PN", "MUELLER^HANNELORE")
        block.add_new(0x03, "OB", b"\0secret.blob\0")
        block.add_new(0x04, "SQ", Sequence([nested]))
    ds.add_new(0x50000022, "LO", "curve-label")
    ds.add_new(0x50003000, "OW", b"secret.blob!")
    ds.add_new(0x60000010, "US", 1)
    ds.add_new(0x60000011, "US", 16)
    ds.add_new(0x60000022, "LO", "overlay-note")
    ds.add_new(0x60003000, "OW", b"secret.blob!")
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [256, 0, 8])
    table.add_new("LUTData", "OW", np.arange(255, -1, -1, dtype="<u2").tobytes())
    table.LUTExplanation = "LUTNOTE MUELLER"
    ds.VOILUTSequence = [table]
    ds.file_meta.SourceApplicationEntityTitle = "SOUTHWARD"
    return ds


def encoded(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.fixture
def export(tmp_path):
    """Return a function that saves a data set and de-identifies it."""

    def export(ds: Dataset, key: bytes = KEY) -> Dataset:
        return deidentify(save(ds, tmp_path / "image.dcm"), key)

    return export


def test_only_the_allowed_attributes_are_exported(export):
    out = export(rich())
    assert {element.keyword for element in out} == KEPT
    assert not out.group_dataset(0x0009)
    assert {element.keyword for element in out.VOILUTSequence[0]} == {"LUTDescriptor", "LUTData"}


@pytest.mark.parametrize("syntax", [EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE, DEFLATED_LE, JPEG_2000_LOSSLESS, JPEG_LS])
def test_no_name_id_date_uid_or_text_of_the_image_is_in_the_exported_bytes(export, syntax):
    source = rich(transfer_syntax=syntax)
    if syntax == EXPLICIT_LE:
        before = encoded(source)
        assert [secret for secret in SECRETS if secret.encode() not in before] == []
    after = encoded(export(source)).decode("latin-1").casefold()
    assert [secret for secret in SECRETS if secret.casefold() in after] == []


@pytest.mark.parametrize("syntax", [EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE, DEFLATED_LE, JPEG_2000_LOSSLESS, JPEG_LS])
@pytest.mark.parametrize("bits", [8, 12])
def test_pixels_and_plate_stay_the_same(export, tmp_path, syntax, bits):
    source = rich(bits=bits, transfer_syntax=syntax)
    out = export(source)
    again = pydicom.dcmread(save(out, tmp_path / "out.dcm"))
    assert np.array_equal(decode(again), decode(source))
    assert np.array_equal(to_plate(again), to_plate(source))
    assert again.file_meta.TransferSyntaxUID == EXPLICIT_LE


def test_overlay_bits_in_the_pixels_are_not_exported(export):
    source = rich(bits=12)
    pixels = np.frombuffer(source.PixelData, "<u2")
    source.PixelData = (pixels | 0x8000).tobytes()
    source.add_new(0x60000102, "US", 15)
    assert np.frombuffer(export(source).PixelData, "<u2").max() < 1 << 12


def test_bytes_after_the_pixels_are_not_exported(export):
    source = rich(transfer_syntax=JPEG_LS)
    source.PixelData += b"\xfe\xff\x00\xe0\x0c\0\0\0PAT-4711    "
    assert b"PAT-4711" in encoded(source)[-40:]
    assert b"PAT-4711" not in encoded(export(source))


def test_an_image_in_a_lossy_syntax_is_exported_as_lossy(export):
    source = rich(bits=8)
    source.file_meta.TransferSyntaxUID = JPEG_BASELINE
    jpeg = imagecodecs.jpeg8_encode(np.frombuffer(source.PixelData, np.uint8).reshape(source.Rows, source.Columns))
    source.PixelData, source["PixelData"].VR = encapsulate([jpeg]), "OB"
    for value in ("00", None):
        source.LossyImageCompression = value
        assert export(source).LossyImageCompression == "01"


def test_a_patient_keeps_one_new_identity_and_the_time_between_two_images(export):
    first, second = rich(1), rich(2)
    second.StudyDate, second.StudyInstanceUID = "20240310", "1.2.276.0.7230010.3.1.4.22"
    a, b = export(first), export(second)
    assert a.PatientID == b.PatientID == a.PatientName
    assert a.StudyInstanceUID != b.StudyInstanceUID
    assert (day(b.StudyDate) - day(a.StudyDate)).days == 10
    assert 1 <= (date(2024, 2, 29) - day(a.StudyDate)).days <= 3650


def test_another_patient_shifts_by_other_days_and_another_site_gives_another_identity(export):
    one, second = rich(), rich()
    second.PatientID = "PAT-4712"
    assert export(one).StudyDate != export(second).StudyDate
    assert export(one).PatientID != export(second).PatientID
    mine, theirs = export(one), export(one, b"another site's key, 32 bytes....")
    for keyword in ("PatientID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        assert mine[keyword].value != theirs[keyword].value


def test_studies_and_series_stay_together_and_uids_are_uids(export):
    a, b = export(rich(1)), export(rich(2))
    assert a.StudyInstanceUID == b.StudyInstanceUID
    assert a.SeriesInstanceUID == b.SeriesInstanceUID
    assert len({a.SOPInstanceUID, b.SOPInstanceUID, a.StudyInstanceUID, a.SeriesInstanceUID}) == 4
    assert all(uid.is_valid and len(uid) <= 64 for uid in (a.SOPInstanceUID, a.StudyInstanceUID, a.SeriesInstanceUID))


def test_the_exported_image_describes_its_deidentification(export):
    out = export(rich())
    assert out.PatientIdentityRemoved == "YES"
    assert "pixels not inspected" in out.DeidentificationMethod[1]
    assert [code.CodeValue for code in out.DeidentificationMethodCodeSequence] == ["113100", "113107", "113108"]
    assert out.LongitudinalTemporalInformationModified == "MODIFIED"


@pytest.mark.parametrize(
    ("value", "exported"), [("093Y", "090Y"), ("090Y", "090Y"), ("041Y", "041Y"), ("007M", "007M")]
)
def test_an_age_is_exported_unless_it_is_rare(export, value, exported):
    source = rich()
    source.PatientAge = value
    assert export(source).PatientAge == exported


def test_a_code_with_a_name_and_a_number_with_text_are_not_exported(export):
    source = rich()
    source.add_new("PatientSex", "CS", "MUELLER")
    source.add_new("DetectorType", "CS", "DR-GRANT")
    source.add_new("PatientOrientation", "CS", "MUELLER")
    source.add_new("ImageType", "CS", ["ORIGINAL", "PRIMARY", "MUELLER"])
    source["KVP"]._value = "PAT-4711"
    out = export(source)
    assert (out.PatientSex, out.DetectorType, out.PatientOrientation) == ("", "", "")
    assert "KVP" not in out
    assert b"MUELLER" not in encoded(out)


@pytest.mark.parametrize(("keyword", "value", "exported"), [
    ("ExposureTime", b"12.5", "12"), ("XRayTubeCurrent", b"1E2", "100"), ("Exposure", b"99999999999999", None),
    ("WindowCenter", b"2047.123456789012345678", "2047.12345678901"), ("KVP", b"1e400", None), ("KVP", b"90", "90"),
])  # fmt: skip
def test_a_number_is_exported_in_a_valid_form(export, keyword, value, exported):
    source = rich()
    source[keyword] = RawDataElement(Tag(keyword), dictionary_VR(keyword), len(value), value, 0, False, True)
    exported = export(source).get(keyword)
    assert (exported if exported is None else str(exported)) == exported


def test_a_spacing_of_zero_is_not_exported(export):
    source = rich()
    source.PixelSpacing, source.ImagerPixelSpacing = ["0", "0"], ["0.15", "0.15"]
    exported = export(source)
    assert "PixelSpacing" not in exported
    assert exported.ImagerPixelSpacing == [0.15, 0.15]


@pytest.mark.parametrize(
    ("keyword", "value", "why"),
    [
        ("BurnedInAnnotation", "YES", "BurnedInAnnotation"),
        ("RecognizableVisualFeatures", "YES", "RecognizableVisualFeatures"),
        ("SOPClassUID", "1.2.840.10008.5.1.4.1.1.7", "Secondary Capture"),
        ("BodyPartExamined", "KNEE", "not the chest"),
        ("PixelData", b"\0\0", "PixelData"),
    ],
)
def test_an_image_that_may_show_a_name_or_is_invalid_is_not_exported(export, keyword, value, why):
    source = rich()
    setattr(source, keyword, value)
    with pytest.raises(NotExportable, match=why):
        export(source)


def test_a_file_that_is_not_dicom_is_not_exported(tmp_path):
    (tmp_path / "page.dcm").write_text("<html>")
    with pytest.raises(NotExportable, match="not a DICOM file"):
        deidentify(tmp_path / "page.dcm", KEY)


@pytest.mark.peer("dicom3tools")
@pytest.mark.parametrize("modality", ["DX", "CR"])
def test_dciodvfy_finds_no_new_error(export, tmp_path, modality):
    source = xray(3, modality=modality, study_date="20240229", sex="M")
    before, after = save(source, tmp_path / "a.dcm"), save(export(source), tmp_path / "b.dcm")
    assert errors(after) <= errors(before)


def errors(path) -> set[str]:
    value = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True)
    return {line for line in (value.stderr + value.stdout).splitlines() if line.startswith("Error")}


def day(text: str) -> date:
    return date.fromisoformat(f"{text[:4]}-{text[4:6]}-{text[6:]}")
