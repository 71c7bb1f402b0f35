"""Plain values of headers, as people and devices write them."""

import pytest
from pydicom.dataset import Dataset

from dicom.dataset import header

pytestmark = pytest.mark.filterwarnings("ignore:.*VR.*:UserWarning")


def dataset(**values):
    ds = Dataset()
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return ds


@pytest.mark.parametrize(
    ("age", "years"),
    [
        ("054Y", 54),
        ("018M", 1.5),
        ("026W", 0.498),
        ("010D", 0.027),
        ("62", 62),
        ("000Y", None),
        ("", None),
        ("x", None),
    ],
)
def test_ages(age, years):
    assert header.age_years(dataset(PatientAge=age)) == (None if years is None else pytest.approx(years, abs=0.001))


def test_without_an_age_it_is_computed_from_the_birth_date():
    assert header.age_years(dataset(PatientBirthDate="20000101", StudyDate="20250101")) == pytest.approx(25, abs=0.01)
    assert header.age_years(dataset(PatientBirthDate="20300101", StudyDate="20250101")) is None
    assert header.age_years(dataset(PatientBirthDate="18000101", StudyDate="20250101")) is None
    assert header.age_years(dataset(PatientBirthDate="20000101")) is None


@pytest.mark.parametrize(
    ("values", "iso"),
    [
        ({"AcquisitionDateTime": "20260102030405.123456+0100"}, "2026-01-02T03:04:05+01:00"),
        ({"AcquisitionDateTime": "20260102030405.5"}, "2026-01-02T03:04:05"),
        ({"AcquisitionDate": "20260102", "AcquisitionTime": "0304"}, "2026-01-02T03:04:00"),
        (
            {"AcquisitionDate": "20260102", "AcquisitionTime": "030405.6", "StudyDate": "19990101"},
            "2026-01-02T03:04:05",
        ),
        ({"ContentDate": "20260102", "ContentTime": "030460"}, "2026-01-02T03:04:59"),
        ({"StudyDate": "20260102"}, "2026-01-02"),
        ({"StudyDate": "2026.01.02", "StudyTime": "03:04:05"}, "2026-01-02T03:04:05"),
        ({"StudyDate": "20260102", "StudyTime": "0304", "TimezoneOffsetFromUTC": "-0500"}, "2026-01-02T03:04:00-05:00"),
        ({"AcquisitionDate": "20261399", "StudyDate": "20260102"}, "2026-01-02"),
        ({"StudyDate": "20260102", "StudyTime": "9999"}, None),
        ({"StudyDate": "yesterday"}, None),
        ({}, None),
    ],
)
def test_the_time_of_the_image(values, iso):
    assert header.acquired_at(dataset(**values)) == iso


def test_texts_lose_their_padding_and_are_decoded():
    ds = dataset(SpecificCharacterSet="ISO_IR 192", Manufacturer=" Ümlaut AG ", ImageType=["A ", " B"])
    assert header.text(ds, "Manufacturer") == "Ümlaut AG"
    assert header.values(ds, "ImageType") == ("A", "B")
    assert header.text(ds, "PatientID") == ""


def test_numbers():
    ds = dataset(WindowCenter=["100.5", "3"], RescaleSlope="1")
    assert header.number(ds, "WindowCenter") == 100.5
    assert header.number(ds, "WindowWidth") is None
    ds.add_new(0x00281053, "LO", "nan")
    with pytest.raises(ValueError):
        header.number(ds, "RescaleSlope")
