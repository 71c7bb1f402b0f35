"""Query and retrieve over DIMSE: C-FIND, then C-GET into the inbox or C-MOVE to the node (PS3.4 C).

Study Root, one association at a time, one image per request. An image received by C-GET is checked as the node checks
a C-STORE. The caller decides about retries.
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
from dicom.client.association import SILENCE, Peer, ReceiveLimit, associated
from dicom.dataset import header
from dicom.dataset.facts import SOP_CLASSES, VERIFICATION
from dicom.dataset.part10 import file_meta
from dicom.dataset.store_status import MISMATCH, OUT_OF_RESOURCES, SUCCESS, store_status
from dicom.dataset.syntaxes import SYNTAXES
from dicom.errors import ArchiveBusy, ArchiveUnusable, ImageMissing
from dicom.store.inbox import Inbox

FIND, MOVE, GET = (f"1.2.840.10008.5.1.4.1.2.2.{n}" for n in (1, 2, 3))  # Study Root (PS3.4 C.6.2)
PENDING = (0xFF00, 0xFF01)
CANCELLED = 0xFE00  # sent by an archive that cuts its answers off, since we never cancel
OUT_OF = (0xA700, 0xA701, 0xA702)  # out of resources: a later request may succeed
UNKNOWN_DESTINATION = 0xA801

T = TypeVar("T")


class Pacs:
    """A PACS; `how` is "get" (images go into `inbox`) or "move" (to the AE title `peer.calling`)."""

    def __init__(self, peer: Peer, inbox: Inbox, how: str):
        self.peer, self.inbox, self.how = peer, inbox, how

    def check_connection(self) -> None:
        """Check by C-ECHO that the PACS answers and accepts our services. Raises ArchiveUnusable, ArchiveBusy."""
        contexts = [build_context(uid) for uid in (VERIFICATION, FIND, self._model)]
        with associated(self.peer, contexts) as (association, _):
            accepted = {context.abstract_syntax for context in association.accepted_contexts}
            for model, name in ((FIND, "C-FIND"), (self._model, f"C-{self.how.upper()}")):
                if model not in accepted:
                    advice = {GET: "; try --how move", MOVE: "; try --how get"}.get(model, "")
                    raise ArchiveUnusable(
                        f"{self.peer} does not offer {name} (Study Root) to {self.peer.calling}{advice}"
                    )
            if VERIFICATION in accepted and association.send_c_echo().get("Status") != SUCCESS:
                raise ArchiveBusy(f"{self.peer} does not answer C-ECHO")

    def studies(self, query: Query) -> tuple[list[Study], bool]:
        """Return the matching studies, and whether the list is complete. Raises ArchiveUnusable, ArchiveBusy."""
        keys = {
            "StudyInstanceUID": query.study,
            "PatientID": query.patient,
            "StudyDate": query.days,
            "NumberOfStudyRelatedInstances": "",
        }
        # only a span of days needs the filter by modality; servers differ in it, and other queries have few answers
        modalities = query.modalities if not (query.study or query.patient) else ("",)
        studies: dict[str, Study] = {}
        complete = True
        with associated(self.peer, [build_context(FIND)]) as (association, _):
            for modality in modalities:
                filters = keys | {"ModalitiesInStudy": modality}
                matches, is_last = _find(
                    association, "STUDY", filters, lambda attributes: archive.study(attributes, query)
                )
                studies |= {study.uid: study for study in matches}
                complete = complete and is_last
                if not association.is_established:  # aborted by _find after too many answers
                    break
        return list(studies.values()), complete

    @contextmanager
    def session(self) -> Iterator["Session"]:
        """Open an association to list and fetch the images of one study. Raises ArchiveUnusable, ArchiveBusy."""
        contexts, roles = [build_context(FIND), build_context(self._model)], []
        if self.how == "get":
            # one context for each syntax, so that the archive sends an image as it is stored
            contexts += [build_context(uid, syntax) for uid in SOP_CLASSES for syntax in SYNTAXES]
            roles = [build_role(uid, scp_role=True) for uid in SOP_CLASSES]
        receiver = Session(self)
        handlers = [(evt.EVT_C_STORE, receiver.store)]
        with associated(self.peer, contexts, roles, handlers) as (receiver.association, receiver.limit):
            yield receiver

    @property
    def _model(self) -> str:
        return GET if self.how == "get" else MOVE


class Session:
    """One association for one study: lists its images and fetches them one by one."""

    association: Association
    limit: ReceiveLimit

    def __init__(self, pacs: Pacs):
        self._pacs = pacs
        self._requested: Image | None = None
        self._stored = self._ended = False
        self._refusal = ""
        self._disk_error: OSError | None = None

    def images(self, study_uid: str, query: Query) -> list[Image]:
        """Return the images of a study that may be chest images. Raises ArchiveUnusable, ArchiveBusy."""
        images: dict[str, Image] = {}
        keys = {"StudyInstanceUID": study_uid, "SeriesInstanceUID": "", "Modality": "", "BodyPartExamined": ""}
        for uid in self._all("SERIES", keys, lambda attributes: archive.series(attributes, study_uid, query)):
            keys = {"StudyInstanceUID": study_uid, "SeriesInstanceUID": uid, "SOPInstanceUID": "", "SOPClassUID": ""}
            for image in self._all(
                "IMAGE", keys, lambda attributes, uid=uid: archive.image(attributes, study_uid, uid)
            ):
                images[image.sop_uid] = image
        return list(images.values())

    def fetch(self, image: Image) -> None:
        """Fetch an image into the inbox (get), or have it sent to our AE title (move).

        Raises ImageMissing, ArchiveBusy, ArchiveUnusable, OSError.
        """
        if self._ended or not self.association.is_established:
            raise ArchiveBusy(f"{self._pacs.peer} ended the association")
        keys = Dataset()
        keys.QueryRetrieveLevel = "IMAGE"
        keys.StudyInstanceUID, keys.SeriesInstanceUID = image.study_uid, image.series_uid
        keys.SOPInstanceUID = image.sop_uid
        self._requested, self._stored, self._refusal, self._disk_error = image, False, "", None
        if self._pacs.how == "get":
            answers = self.association.send_c_get(keys, GET)
        else:
            answers = self.association.send_c_move(keys, self._pacs.peer.calling, MOVE)
        last = [status for status, _ in answers][-1]  # all others are pending
        self._ended = last.get("Status") is None  # the library detects this only later
        if self._disk_error:
            raise self._disk_error
        if self._stored:
            return
        self._raise_failure(last)

    def _raise_failure(self, last: Dataset) -> None:
        """Raise the exception for an image that was not received; return when C-MOVE reports that it was sent."""
        peer, status = self._pacs.peer, last.get("Status")
        if self.limit.too_long:
            raise ImageMissing(f"larger than {MAX_IMAGE >> 20} MiB")
        if self._refusal:
            raise ImageMissing(self._refusal)
        if status is None:
            raise ArchiveBusy(
                f"{peer} closed the connection, or sent nothing for {SILENCE} s, during the transfer of an image"
            )
        if status in OUT_OF:
            raise ArchiveBusy(f"{peer} is out of resources (status {status:04X})")
        if status == UNKNOWN_DESTINATION:
            our_aet = peer.calling
            raise ArchiveUnusable(
                f"{peer} does not know the move destination {our_aet} (status A801): "
                f"add {our_aet} there, with our address and port"
            )
        if status != SUCCESS or last.get("NumberOfFailedSuboperations"):
            where = f" to {peer.calling}: it may not know this move destination" if self._pacs.how == "move" else ""
            raise ImageMissing(f"the archive could not send it{where} (status {status:04X})")
        if self._pacs.how == "get" or last.get("NumberOfCompletedSuboperations") == 0:
            raise ImageMissing("the archive lists it, but does not send it")

    def store(self, event: Event) -> int:
        """Store an image received by C-GET; checked as the node checks it, and Success only once it is durable."""
        request = cast(C_STORE, event.request)
        sop_class, sop_uid = (
            str(uid or "").strip("\0 ") for uid in (request.AffectedSOPClassUID, request.AffectedSOPInstanceUID)
        )
        if self._requested is None or sop_uid != self._requested.sop_uid:
            self._refusal = "the archive sent another image than the requested one"
            return MISMATCH
        syntax, received = str(event.context.transfer_syntax), request.DataSet or io.BytesIO()
        received.seek(0)
        status, why = store_status(received, syntax, sop_class, sop_uid)
        if status != SUCCESS:
            self._refusal = f"the archive's image is refused ({status:04X}): {why}"
            return status
        try:
            self._pacs.inbox.put_parts([file_meta(sop_class, sop_uid, syntax), cast(io.BytesIO, received).getbuffer()])
        except OSError as error:
            self._disk_error = error
            return OUT_OF_RESOURCES
        self._stored = True
        return SUCCESS

    def _all(self, level: str, keys: dict[str, str], make: Callable[[archive.Attributes], T | None]) -> list[T]:
        matches, complete = _find(self.association, level, keys, make)
        if not complete:
            raise ArchiveUnusable(
                f"{self._pacs.peer} has more than {len(matches)} answers at {level} level for one study"
            )
        return matches


def _find(
    association: Association, level: str, keys: dict[str, str], make: Callable[[archive.Attributes], T | None]
) -> tuple[list[T], bool]:
    """Return what `make` makes of each answer, without Nones, and whether the list is complete.

    Raises ArchiveUnusable, ArchiveBusy.
    """
    if not association.is_established:
        raise ArchiveBusy("the archive ended the association")
    request = Dataset()
    request.SpecificCharacterSet = "ISO_IR 192"
    request.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(request, keyword, value)
    matches: list[T] = []
    count, status = 0, None
    for status, identifier in association.send_c_find(request, FIND):
        code = status.get("Status")
        if code not in PENDING:
            break
        if identifier is None:  # not decodable
            continue
        count += 1
        if count > MAX_MATCHES:
            association.abort()
            return matches, False
        made = make(lambda keyword, answer=identifier: header.text(answer, keyword))
        if made is not None:
            matches.append(made)
    code = status.get("Status") if status else None
    if code is None:
        raise ArchiveBusy(f"the archive closed the connection, or sent nothing for {SILENCE} s, during C-FIND")
    if code in OUT_OF:
        raise ArchiveBusy(f"the archive is out of resources for C-FIND (status {code:04X})")
    if code not in (SUCCESS, CANCELLED):
        raise ArchiveUnusable(f"the archive cannot answer C-FIND at {level} level (status {code:04X})")
    return matches, code == SUCCESS
