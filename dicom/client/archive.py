"""What an archive is asked for, and its answers as plain values, each checked against what was asked.

Servers leave out keys, ignore filters and repeat themselves: nothing is believed here that can be checked.
Knows no network, no disk and no ledger.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

from dicom.dataset.facts import RESULT_UID_ROOT, SOP_CLASSES
from dicom.dataset.part10 import is_uid
from dicom.intake.admission import CHEST

MAX_IMAGE = 128 << 20  # bytes; twice the largest detector's uncompressed image, and all that one answer may hold
MAX_MATCHES = 5000  # answers to one question: a busy hospital's studies of a day and a modality are a tenth of it

Say = Callable[[str], str]  # the text of an answer's attribute by keyword, "" when it has none


@dataclass(frozen=True)
class Query:
    """One question: a patient, a study, a span of days, or several of these at once; "" and None mean any."""

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
    uid: str
    instances: int | None  # as the archive counts them; None when it does not say


@dataclass(frozen=True)
class Image:
    study_uid: str
    series_uid: str
    sop_uid: str
    sop_class: str  # "" when the archive does not say


def study(say: Say, wanted: Query) -> Study | None:
    """The study of one answer, or None when it is not what was asked for."""
    uid = say("StudyInstanceUID")
    if not is_uid(uid) or (wanted.study and uid != wanted.study):
        return None
    if wanted.patient and say("PatientID") != wanted.patient:
        return None
    if wanted.days and not _within(say("StudyDate"), wanted.since, wanted.until):
        return None
    modalities = set(say("ModalitiesInStudy").upper().split("\\")) - {""}
    if modalities and not modalities & set(wanted.modalities):
        return None
    count = say("NumberOfStudyRelatedInstances")
    return Study(uid, int(count) if re.fullmatch(r"\d{1,9}", count) else None)


def series(say: Say, study_uid: str, wanted: Query) -> str | None:
    """The UID of a series that may hold chest images, or None. A modality or body part that is not told passes."""
    uid = say("SeriesInstanceUID")
    if not is_uid(uid) or say("StudyInstanceUID") not in ("", study_uid):
        return None
    modality = say("Modality").upper()
    if modality and modality not in wanted.modalities:
        return None
    words = set(re.findall(r"[A-Z0-9]+", say("BodyPartExamined").upper()))
    return None if words and not words & CHEST else uid


def image(say: Say, study_uid: str, series_uid: str) -> Image | None:
    """The image of one answer; None for another class of object, and for our own results."""
    uid, sop_class = say("SOPInstanceUID"), say("SOPClassUID")
    if not is_uid(uid) or uid.startswith(RESULT_UID_ROOT):
        return None
    if say("SeriesInstanceUID") not in ("", series_uid) or (sop_class and sop_class not in SOP_CLASSES):
        return None
    return Image(study_uid, series_uid, uid, sop_class)


def _within(stamp: str, since: date | None, until: date | None) -> bool:
    """True for a StudyDate in the span; a study without a readable date is in none."""
    found = re.fullmatch(r"(\d{4})\.?(\d\d)\.?(\d\d)", stamp)
    try:
        day = date(*map(int, found.groups())) if found else None
    except ValueError:
        return False
    return day is not None and (since is None or day >= since) and (until is None or day <= until)
