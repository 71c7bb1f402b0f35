"""Asking a PACS over DIMSE: C-FIND for what there is, then C-GET into the inbox or C-MOVE to the node (PS3.4 C).

One association at a time, one image a request, Study Root. What comes by C-GET is judged and kept as what the node
receives. Knows no ledger, and decides nothing about when to try again.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

from pydicom.dataset import Dataset
from pynetdicom import build_context, build_role, evt
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.events import Event

from dicom.client import archive
from dicom.client.archive import MAX_IMAGE, MAX_MATCHES, Image, Query, Study
from dicom.client.association import SILENCE, Bounds, Peer, associated
from dicom.dataset import header
from dicom.dataset.facts import SOP_CLASSES
from dicom.dataset.part10 import file_meta
from dicom.dataset.syntaxes import SYNTAXES
from dicom.errors import ArchiveBusy, ArchiveUnusable, ImageMissing
from dicom.node.reception import MISMATCH, OUT_OF_RESOURCES, SUCCESS, answer
from dicom.store.inbox import Inbox

VERIFICATION = "1.2.840.10008.1.1"
FIND, MOVE, GET = (f"1.2.840.10008.5.1.4.1.2.2.{n}" for n in (1, 2, 3))  # Study Root (PS3.4 C.6.2)
PENDING = (0xFF00, 0xFF01)
CANCELLED = 0xFE00  # what an archive says that cuts its answers off, since we cancel nothing
OUT_OF = (0xA700, 0xA701, 0xA702)  # out of resources: later it may have some
UNKNOWN_DESTINATION = 0xA801

T = TypeVar("T")


class Pacs:
    """A PACS whose images come by `how`: "get" into `inbox`, or "move" to the AE title `calling` of the peer."""

    def __init__(self, peer: Peer, inbox: Inbox, how: str):
        self.peer, self.inbox, self.how = peer, inbox, how

    def check_connection(self) -> None:
        """C-ECHO, and whether it offers what we will ask. Raises ArchiveUnusable, ArchiveBusy."""
        contexts = [build_context(uid) for uid in (VERIFICATION, FIND, self._model)]
        with associated(self.peer, contexts) as (association, _):
            offered = {context.abstract_syntax for context in association.accepted_contexts}
            for model, name in ((FIND, "C-FIND"), (self._model, f"C-{self.how.upper()}")):
                if model not in offered:
                    other = {GET: "; try --how move", MOVE: "; try --how get"}.get(model, "")
                    raise ArchiveUnusable(
                        f"{self.peer} does not offer {name} (Study Root) to {self.peer.calling}{other}"
                    )
            if VERIFICATION in offered and association.send_c_echo().get("Status") != SUCCESS:
                raise ArchiveBusy(f"{self.peer} does not answer C-ECHO")

    def studies(self, wanted: Query) -> tuple[list[Study], bool]:
        """The studies that match, and whether that is all of them. Raises ArchiveUnusable, ArchiveBusy."""
        keys = {
            "StudyInstanceUID": wanted.study,
            "PatientID": wanted.patient,
            "StudyDate": wanted.days,
            "NumberOfStudyRelatedInstances": "",
        }
        # only a span of days needs the filter; elsewhere the few answers are checked, and servers differ in it
        modalities = wanted.modalities if not (wanted.study or wanted.patient) else ("",)
        found: dict[str, Study] = {}
        whole = True
        with associated(self.peer, [build_context(FIND)]) as (association, _):
            for modality in modalities:
                asked = keys | {"ModalitiesInStudy": modality}
                one, all_of_it = _find(association, "STUDY", asked, lambda say: archive.study(say, wanted))
                found |= {study.uid: study for study in one}
                whole = whole and all_of_it
                if not association.is_established:  # an answer without end
                    break
        return list(found.values()), whole

    @contextmanager
    def session(self) -> Iterator["Session"]:
        """An association on which one study is looked through and fetched. Raises ArchiveUnusable, ArchiveBusy."""
        contexts, roles = [build_context(FIND), build_context(self._model)], []
        if self.how == "get":
            # one context for each syntax: the archive sends an image as it has it, and chooses nothing for us
            contexts += [build_context(uid, syntax) for uid in SOP_CLASSES for syntax in SYNTAXES]
            roles = [build_role(uid, scp_role=True) for uid in SOP_CLASSES]
        receiver = Session(self)
        handlers = [(evt.EVT_C_STORE, receiver.store)]
        with associated(self.peer, contexts, roles, handlers) as (receiver.association, receiver.bounds):
            yield receiver

    @property
    def _model(self) -> str:
        return GET if self.how == "get" else MOVE


class Session:
    """One association, one study: what images it has, and fetching them one by one."""

    association: Association
    bounds: Bounds

    def __init__(self, pacs: Pacs):
        self._pacs = pacs
        self._asked: Image | None = None
        self._kept = self._ended = False
        self._refused = ""
        self._disk: OSError | None = None

    def images(self, study_uid: str, wanted: Query) -> list[Image]:
        """The images of a study that may be chest images. Raises ArchiveUnusable, ArchiveBusy."""
        found: dict[str, Image] = {}
        keys = {"StudyInstanceUID": study_uid, "SeriesInstanceUID": "", "Modality": "", "BodyPartExamined": ""}
        for uid in self._all("SERIES", keys, lambda say: archive.series(say, study_uid, wanted)):
            keys = {"StudyInstanceUID": study_uid, "SeriesInstanceUID": uid, "SOPInstanceUID": "", "SOPClassUID": ""}
            for image in self._all("IMAGE", keys, lambda say, uid=uid: archive.image(say, study_uid, uid)):
                found[image.sop_uid] = image
        return list(found.values())

    def fetch(self, image: Image) -> None:
        """The image is in the inbox (get), or was sent to our AE title (move). Raises ImageMissing, ArchiveBusy, ArchiveUnusable, OSError."""
        if self._ended or not self.association.is_established:
            raise ArchiveBusy(f"{self._pacs.peer} ended the association")
        keys = Dataset()
        keys.QueryRetrieveLevel = "IMAGE"
        keys.StudyInstanceUID, keys.SeriesInstanceUID = image.study_uid, image.series_uid
        keys.SOPInstanceUID = image.sop_uid
        self._asked, self._kept, self._refused, self._disk = image, False, "", None
        if self._pacs.how == "get":
            answers = self.association.send_c_get(keys, GET)
        else:
            answers = self.association.send_c_move(keys, self._pacs.peer.calling, MOVE)
        last = [status for status, _ in answers][-1]  # those before it are pending
        self._ended = last.get("Status") is None  # the library notices only later, and would wait for an answer in vain
        if self._disk:
            raise self._disk
        if self._kept:
            return
        self._judge(last)

    def _judge(self, last: Dataset) -> None:
        """Raise what the last answer means for an image that we did not get; return when C-MOVE says that it went out."""
        peer, status = self._pacs.peer, last.get("Status")
        if self.bounds.too_long:
            raise ImageMissing(f"larger than {MAX_IMAGE >> 20} MiB")
        if self._refused:
            raise ImageMissing(self._refused)
        if status is None:
            raise ArchiveBusy(f"{peer} hung up, or said nothing for {SILENCE} s, while it sent an image")
        if status in OUT_OF:
            raise ArchiveBusy(f"{peer} is out of resources (status {status:04X})")
        if status == UNKNOWN_DESTINATION:
            us = peer.calling
            raise ArchiveUnusable(
                f"{peer} does not know where {us} is (status A801): enter {us}, our address and port there"
            )
        if status != SUCCESS or last.get("NumberOfFailedSuboperations"):
            where = f" to {peer.calling}: it may not know where that is" if self._pacs.how == "move" else ""
            raise ImageMissing(f"the archive could not send it{where} (status {status:04X})")
        if self._pacs.how == "get" or last.get("NumberOfCompletedSuboperations") == 0:
            raise ImageMissing("the archive lists it, but does not send it")

    def store(self, event: Event) -> int:
        """An image on its way by C-GET: judged as what the node receives, and Success only once it is durable."""
        request = cast(C_STORE, event.request)
        sop_class, sop_uid = (
            str(uid or "").strip("\0 ") for uid in (request.AffectedSOPClassUID, request.AffectedSOPInstanceUID)
        )
        if self._asked is None or sop_uid != self._asked.sop_uid:
            self._refused = "the archive sent another image than the one asked for"
            return MISMATCH
        syntax, received = str(event.context.transfer_syntax), request.DataSet or io.BytesIO()
        received.seek(0)
        status, why = answer(received, syntax, sop_class, sop_uid)
        if status != SUCCESS:
            self._refused = f"what the archive sends is refused ({status:04X}): {why}"
            return status
        try:
            self._pacs.inbox.put_parts([file_meta(sop_class, sop_uid, syntax), cast(io.BytesIO, received).getbuffer()])
        except OSError as error:
            self._disk = error
            return OUT_OF_RESOURCES
        self._kept = True
        return SUCCESS

    def _all(self, level: str, keys: dict[str, str], make: Callable[[archive.Say], T | None]) -> list[T]:
        found, whole = _find(self.association, level, keys, make)
        if not whole:
            raise ArchiveUnusable(
                f"{self._pacs.peer} has more than {len(found)} answers at {level} level for one study"
            )
        return found


def _find(
    association: Association, level: str, keys: dict[str, str], make: Callable[[archive.Say], T | None]
) -> tuple[list[T], bool]:
    """What `make` makes of each answer, Nones left out, and whether these are all. Raises ArchiveUnusable, ArchiveBusy."""
    if not association.is_established:
        raise ArchiveBusy("the archive ended the association")
    asked = Dataset()
    asked.SpecificCharacterSet = "ISO_IR 192"
    asked.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(asked, keyword, value)
    found: list[T] = []
    count, status = 0, None
    for status, identifier in association.send_c_find(asked, FIND):
        code = status.get("Status")
        if code not in PENDING:
            break
        if identifier is None:  # not decodable
            continue
        count += 1
        if count > MAX_MATCHES:
            association.abort()
            return found, False
        made = make(lambda keyword, answer=identifier: header.text(answer, keyword))
        if made is not None:
            found.append(made)
    code = status.get("Status") if status else None
    if code is None:
        raise ArchiveBusy(f"the archive hung up, or said nothing for {SILENCE} s, while it answered C-FIND")
    if code in OUT_OF:
        raise ArchiveBusy(f"the archive is out of resources for C-FIND (status {code:04X})")
    if code not in (SUCCESS, CANCELLED):
        raise ArchiveUnusable(f"the archive can't answer C-FIND at {level} level (status {code:04X})")
    return found, code == SUCCESS
