"""Queries to an archive, and its answers as plain values, each checked against the query.

Servers omit keys, ignore filters and repeat answers, so every answer is checked. Must not import network modules.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

from dicom.dataset.chest_codes import CHEST_WORDS
from dicom.dataset.facts import RESULT_UID_ROOT, SOP_CLASSES
from dicom.dataset.header import parse_day
from dicom.dataset.part10 import is_uid

MAX_IMAGE = 128 << 20  # bytes of one answer; twice the uncompressed image of the largest detector
MAX_MATCHES = 5000  # answers to one query: ten times a busy hospital's studies of one day and modality

Attributes = Callable[[str], str]  # the text of an answer's attribute by keyword, "" when it has none


@dataclass(frozen=True)
class Query:
    """A query by patient, study or days, or several of these; "" and None mean any."""

    modalities: tuple[str, ...] = ("CR", "DX")
    patient: str = ""
    study: str = ""
    since: date | None = None
    until: date | None = None

    @property
    def days(self) -> str:
        """The range of StudyDate as DICOM matches it (PS3.4 C.2.2.2.5), "" for any."""
        if self.since is None and self.until is None:
            return ""
        first, last = (f"{day:%Y%m%d}" if day else "" for day in (self.since, self.until))
        return first if first == last else f"{first}-{last}"


@dataclass(frozen=True)
class Study:
    """A study of the archive."""

    uid: str
    instances: int | None  # as the archive counts them; None when the answer has no count


@dataclass(frozen=True)
class Image:
    """An image of the archive."""

    study_uid: str
    series_uid: str
    sop_uid: str
    sop_class: str  # "" when the answer has none


def study(attributes: Attributes, query: Query) -> Study | None:
    """Return the study of one answer, or None when it does not match the query."""
    uid = attributes("StudyInstanceUID")
    if not is_uid(uid) or (query.study and uid != query.study):
        return None
    if query.patient and attributes("PatientID") != query.patient:
        return None
    if query.days and not _within(attributes("StudyDate"), query.since, query.until):
        return None
    modalities = set(attributes("ModalitiesInStudy").upper().split("\\")) - {""}
    if modalities and not modalities & set(query.modalities):
        return None
    count = attributes("NumberOfStudyRelatedInstances")
    return Study(uid, int(count) if re.fullmatch(r"\d{1,9}", count) else None)


def series(attributes: Attributes, study_uid: str, query: Query) -> str | None:
    """Return the UID of a series that may contain chest images, or None. An absent modality or body part passes."""
    uid = attributes("SeriesInstanceUID")
    if not is_uid(uid) or attributes("StudyInstanceUID") not in ("", study_uid):
        return None
    modality = attributes("Modality").upper()
    if modality and modality not in query.modalities:
        return None
    words = set(re.findall(r"[A-Z0-9]+", attributes("BodyPartExamined").upper()))
    return None if words and not words & CHEST_WORDS else uid


def image(attributes: Attributes, study_uid: str, series_uid: str) -> Image | None:
    """Return the image of one answer; None for another SOP class, and for our own results."""
    uid, sop_class = attributes("SOPInstanceUID"), attributes("SOPClassUID")
    if not is_uid(uid) or uid.startswith(RESULT_UID_ROOT):
        return None
    if attributes("SeriesInstanceUID") not in ("", series_uid) or (sop_class and sop_class not in SOP_CLASSES):
        return None
    return Image(study_uid, series_uid, uid, sop_class)


def _within(stamp: str, since: date | None, until: date | None) -> bool:
    """Return whether a StudyDate is in the span; False for a study without a valid date."""
    day = parse_day(stamp)
    return day is not None and (since is None or day >= since) and (until is None or day <= until)
