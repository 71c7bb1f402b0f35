"""Checks of an archive's answers, and the StudyDate range of a query."""

from datetime import date

from dicom.client import archive
from dicom.client.archive import Image, Query

STUDY = "1.2.3"


def attributes(**answer):
    return lambda keyword: answer.get(keyword, "")


def test_a_study_that_does_not_match_the_query_is_skipped():
    query = Query(patient="P1", since=date(2026, 1, 1), until=date(2026, 1, 31))
    good = {"StudyInstanceUID": STUDY, "PatientID": "P1", "StudyDate": "20260115", "ModalitiesInStudy": "CT\\CR"}
    assert archive.study(attributes(**good), query) == archive.Study(STUDY, None)
    assert archive.study(attributes(**good | {"NumberOfStudyRelatedInstances": "7"}), query) == archive.Study(STUDY, 7)
    wrong = [
        {"PatientID": "P2"}, {"PatientID": ""}, {"StudyDate": "20260201"}, {"StudyDate": ""}, {"StudyDate": "20261399"},
        {"ModalitiesInStudy": "CT"}, {"StudyInstanceUID": "../../etc"},
    ]  # fmt: skip
    assert [archive.study(attributes(**good | change), query) for change in wrong] == [None] * len(wrong)
    assert archive.study(attributes(**good), Query(study="1.2.4")) is None


def test_a_series_passes_unless_its_header_excludes_a_chest_image():
    good = {"SeriesInstanceUID": "1.5"}
    assert archive.series(attributes(**good), STUDY, Query()) == "1.5"
    for part in ("CHEST", "Chest PA", "THORAX", ""):
        assert archive.series(attributes(**good, Modality="DX", BodyPartExamined=part), STUDY, Query()) == "1.5"
    assert archive.series(attributes(**good, Modality="CT"), STUDY, Query()) is None
    assert archive.series(attributes(**good, Modality="CR", BodyPartExamined="KNEE"), STUDY, Query()) is None
    assert archive.series(attributes(**good, StudyInstanceUID="9.9"), STUDY, Query()) is None


def test_our_own_results_and_other_sop_classes_are_skipped():
    assert archive.image(attributes(SOPInstanceUID="1.7"), STUDY, "1.5") == Image(STUDY, "1.5", "1.7", "")
    assert archive.image(attributes(SOPInstanceUID="1.2.826.0.1.3680043.8.498.7427.9.1"), STUDY, "1.5") is None
    assert (
        archive.image(attributes(SOPInstanceUID="1.7", SOPClassUID="1.2.840.10008.5.1.4.1.1.2"), STUDY, "1.5") is None
    )


def test_a_span_of_days_is_a_dicom_range():
    day = date(2026, 1, 5)
    assert [Query(since=a, until=b).days for a, b in ((None, None), (day, None), (None, day), (day, day))] == [
        "", "20260105-", "-20260105", "20260105"
    ]  # fmt: skip
