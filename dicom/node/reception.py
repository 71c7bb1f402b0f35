"""One object's way from a C-STORE command to its status: written as it comes, judged, made durable, answered.

The status follows PS3.4 B.2.3 and PS3.7 C; the transport above and the inbox's manner below are not its business.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dicom.dataset import header
from dicom.dataset.part10 import NATIVE, UNDEFINED, file_meta, is_uid, read_header
from dicom.errors import Unreadable
from dicom.node.dimse_command import Command
from dicom.store.inbox import Inbox, Incoming

LARGEST = 1 << 30  # bytes of one object; no image comes near, and a sender without end must not fill the disk
SUCCESS = 0x0000
INVALID_INSTANCE = 0x0117
NOT_SUPPORTED = 0x0122  # SOP class other than the presentation context's
OUT_OF_RESOURCES = 0xA700
MISMATCH = 0xA900  # data set does not match SOP class (or instance) of the command
NOT_UNDERSTOOD = 0xC000


def answer(data_set: BinaryIO, syntax: str, sop_class: str, sop_uid: str) -> tuple[int, str]:
    """(status, why) for a data set received in `syntax` under the command's SOP class and instance UIDs.

    A storage node does not refuse by content: a knee, an image without pixels or with odd ones is a Success here,
    and set aside by the intake. Refused is only what can't be understood or contradicts its command.
    """
    sop_class, sop_uid = sop_class.strip("\0 "), sop_uid.strip("\0 ")
    if not is_uid(sop_uid):
        return INVALID_INSTANCE, "AffectedSOPInstanceUID (0000,1000) is not a UID"
    try:
        found = read_header(data_set, syntax, pixels=False)
    except Unreadable as error:
        return NOT_UNDERSTOOD, str(error)
    uid = header.text(found.dataset, "SOPInstanceUID")
    if not is_uid(uid):
        return NOT_UNDERSTOOD, "SOPInstanceUID (0008,0018) is missing or not a UID"
    if uid != sop_uid:
        return MISMATCH, "SOPInstanceUID (0008,0018) is not the command's"
    if header.text(found.dataset, "SOPClassUID") != sop_class:
        return MISMATCH, "SOPClassUID (0008,0016) is not the command's"
    if found.pixel_length is not None and (found.pixel_length == UNDEFINED) == (syntax in NATIVE):
        return NOT_UNDERSTOOD, "PixelData (7FE0,0010) is not encoded as the transfer syntax says"
    return SUCCESS, ""


@dataclass(frozen=True)
class Answer:
    """What the peer is told; `path` is the durable file of a Success."""

    status: int
    why: str = ""
    path: Path | None = None


class Reception:
    """One object on its way in. What is refused early is still read to its end, so that the association lives."""

    def __init__(self, inbox: Inbox, command: Command, sop_class: str, syntax: str):
        """`sop_class` and `syntax` are those of the presentation context."""
        self._command, self._sop_class, self._syntax = command, sop_class, syntax
        self._incoming: Incoming | None = None
        self._refusal: Answer | None = None
        self.size = self._meta = 0
        if not is_uid(command.sop_uid):
            self._refuse(INVALID_INSTANCE, "AffectedSOPInstanceUID (0000,1000) is not a UID")
        elif not is_uid(command.sop_class):
            self._refuse(MISMATCH, "AffectedSOPClassUID (0000,0002) is not a UID")
        else:
            envelope = file_meta(command.sop_class, command.sop_uid, syntax)
            self._meta = len(envelope)
            try:
                self._incoming = inbox.begin()
                self._incoming.write(envelope)
            except OSError as error:
                self._refuse(OUT_OF_RESOURCES, f"disk: {error.strerror}")

    def write(self, parts: list[memoryview]) -> None:
        """The next bytes of the data set, in order; raises nothing, a full disk becomes the answer."""
        self.size += sum(len(part) for part in parts)
        if self._incoming is None:
            return
        if self.size > LARGEST:
            return self._refuse(OUT_OF_RESOURCES, f"object larger than {LARGEST >> 20} MiB")
        try:
            self._incoming.write(*parts)
        except OSError as error:
            self._refuse(OUT_OF_RESOURCES, f"disk: {error.strerror}")

    def end(self) -> Answer:
        """Judge the whole object; a Success is durable when this returns."""
        if self._incoming is None:
            return self._refusal or Answer(NOT_UNDERSTOOD, "no data set")
        command = self._command
        with self._incoming.reader(self._meta) as stream:
            status, why = answer(stream, self._syntax, command.sop_class, command.sop_uid)
        # a class that the context doesn't carry: then its syntax needn't be the data set's either
        if status in (SUCCESS, NOT_UNDERSTOOD) and command.sop_class != self._sop_class:
            status, why = NOT_SUPPORTED, "AffectedSOPClassUID (0000,0002) is not the presentation context's"
        if status != SUCCESS:
            self.drop()
            return Answer(status, why)
        try:
            return Answer(SUCCESS, path=self._incoming.commit())
        except OSError as error:
            return Answer(OUT_OF_RESOURCES, f"disk: {error.strerror}")
        finally:
            self.drop()

    def drop(self) -> None:
        """Leave nothing behind but a committed file; may be called twice."""
        if self._incoming:
            self._incoming.__exit__()
            self._incoming = None

    def _refuse(self, status: int, why: str) -> None:
        self._refusal = Answer(status, why)
        self.drop()
