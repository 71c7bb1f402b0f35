"""Receives one object, from its C-STORE command to its status: write, check, make durable, respond."""

from dataclasses import dataclass
from pathlib import Path

from dicom.dataset.part10 import file_meta, is_uid
from dicom.dataset.store_status import (
    INVALID_INSTANCE,
    MISMATCH,
    NOT_SUPPORTED,
    NOT_UNDERSTOOD,
    OUT_OF_RESOURCES,
    SUCCESS,
    store_status,
)
from dicom.node.dimse_command import Command
from dicom.store.inbox import Inbox, Incoming

LARGEST = 1 << 30  # bytes of one object, far more than any image; an endless object must not fill the disk


@dataclass(frozen=True)
class Response:
    """The status for the peer, and its reason; `path` is the durable file of a Success."""

    status: int
    why: str = ""
    path: Path | None = None


class Reception:
    """One object being received. A refused object is still read to its end, so that the association continues."""

    def __init__(self, inbox: Inbox, command: Command, sop_class: str, syntax: str):
        """Start the file in the inbox; `sop_class` and `syntax` are those of the presentation context."""
        self._command, self._sop_class, self._syntax = command, sop_class, syntax
        self._incoming: Incoming | None = None
        self._refusal: Response | None = None
        self.size = self._meta_size = 0  # bytes of the data set, and of the file meta before it
        if not is_uid(command.sop_uid):
            self._refuse(INVALID_INSTANCE, "AffectedSOPInstanceUID (0000,1000) is not a UID")
        elif not is_uid(command.sop_class):
            self._refuse(MISMATCH, "AffectedSOPClassUID (0000,0002) is not a UID")
        else:
            envelope = file_meta(command.sop_class, command.sop_uid, syntax)
            self._meta_size = len(envelope)
            try:
                self._incoming = inbox.begin()
                self._incoming.write(envelope)
            except OSError as error:
                self._refuse(OUT_OF_RESOURCES, f"disk: {error.strerror}")

    def write(self, parts: list[memoryview]) -> None:
        """Append the next bytes of the data set. Raises nothing: after a disk error the response is a refusal."""
        self.size += sum(len(part) for part in parts)
        if self._incoming is None:
            return
        if self.size > LARGEST:
            return self._refuse(OUT_OF_RESOURCES, f"object larger than {LARGEST >> 20} MiB")
        try:
            self._incoming.write(*parts)
        except OSError as error:
            self._refuse(OUT_OF_RESOURCES, f"disk: {error.strerror}")

    def finish(self) -> Response:
        """Check the complete object and return the response; the file of a Success is durable then."""
        if self._incoming is None:
            return self._refusal or Response(NOT_UNDERSTOOD, "no data set")
        command = self._command
        with self._incoming.reader(self._meta_size) as stream:
            status, why = store_status(stream, self._syntax, command.sop_class, command.sop_uid)
        # a SOP class of another context may have another syntax, so NOT_UNDERSTOOD would mislead
        if status in (SUCCESS, NOT_UNDERSTOOD) and command.sop_class != self._sop_class:
            status, why = NOT_SUPPORTED, "AffectedSOPClassUID (0000,0002) is not the presentation context's"
        if status != SUCCESS:
            self.drop()
            return Response(status, why)
        try:
            return Response(SUCCESS, path=self._incoming.commit())
        except OSError as error:
            return Response(OUT_OF_RESOURCES, f"disk: {error.strerror}")
        finally:
            self.drop()

    def drop(self) -> None:
        """Remove the file unless it is committed. May be called twice."""
        if self._incoming:
            self._incoming.__exit__()
            self._incoming = None

    def _refuse(self, status: int, why: str) -> None:
        self._refusal = Response(status, why)
        self.drop()
