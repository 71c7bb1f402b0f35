"""Sends to other nodes: C-STORE of images byte for byte, C-ECHO, N-EVENT-REPORT.

Used for imports, results, storage commitment, the demo's PACS and tests. Does not retry.
"""

import io
import queue
import ssl
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydicom import dcmwrite
from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import AE, build_context, build_role
from pynetdicom.dimse_primitives import C_STORE, N_EVENT_REPORT
from pynetdicom.dsutils import encode

from dicom.client.association import LARGEST_PDU
from dicom.client.reactor_pause import pause_reactor
from dicom.dataset import header
from dicom.dataset.facts import COMMITMENT_INSTANCE, STORAGE_COMMITMENT, VERIFICATION
from dicom.dataset.part10 import EXPLICIT_LE, HOSTILE, IMPLICIT_LE, open_envelope, read_header
from dicom.errors import Unreadable

MAX_CONTEXTS = 128  # PS3.8: odd identifiers from 1 to 255
TIMEOUT = 30  # seconds for an answer
TRANSFER = "Sta6"  # PS3.8 9.2.1: association established, ready for data transfer
UNREADABLE, NO_ASSOCIATION, NO_CONTEXT, NO_ANSWER = "unreadable", "no association", "no accepted context", "no answer"


@dataclass(frozen=True)
class Sent:
    """The result for one item: its C-STORE status; or None, and in `why` the reason."""

    item: Path | Dataset
    status: int | None
    why: str = ""


class _Image:
    """One item to send: encoded data set, and the UIDs for its command."""

    def __init__(self, item: Path | Dataset):
        if isinstance(item, Dataset):
            buffer = io.BytesIO()
            dcmwrite(buffer, item, enforce_file_format=True)
            file = buffer.getvalue()
        else:
            file = item.read_bytes()
        stream = io.BytesIO(file)
        envelope = open_envelope(stream)
        ds = read_header(stream, envelope.transfer_syntax).dataset
        self.syntax = envelope.transfer_syntax
        self.sop_class, self.sop_uid = header.text(ds, "SOPClassUID"), header.text(ds, "SOPInstanceUID")
        self.data = file[envelope.offset :]
        if not self.sop_class or not self.sop_uid:
            raise Unreadable("no SOP class or instance UID")


def echo(
    host: str, port: int, called_aet: str, calling_aet: str = "CXRSEND", tls: ssl.SSLContext | None = None
) -> bool:
    """Return whether the node at host:port answers C-ECHO with Success; over TLS if a context is given."""
    connection = _Connection(host, port, called_aet, calling_aet, [(VERIFICATION, IMPLICIT_LE)], tls)
    try:
        return connection.is_open and connection.association.send_c_echo().get("Status") == 0
    finally:
        connection.close()


def send(
    items: Iterable[Path | Dataset],
    host: str,
    port: int,
    called_aet: str,
    calling_aet: str = "CXRSEND",
    tls: ssl.SSLContext | None = None,
) -> Iterator[tuple[Path | Dataset, int | None]]:
    """Yield each item with its C-STORE status; None when it was not readable, not accepted or not answered."""
    for sent in deliver(items, host, port, called_aet, calling_aet, tls):
        yield sent.item, sent.status


def deliver(
    items: Iterable[Path | Dataset],
    host: str,
    port: int,
    called_aet: str,
    calling_aet: str = "CXRSEND",
    tls: ssl.SSLContext | None = None,
    kinds: Iterable[tuple[str, str]] = (),
) -> Iterator[Sent]:
    """Yield the result for each item, in order; after a refused or unanswered item the next one is sent.

    Uses one association as long as it is open and has the needed context; each syntax gets its own context. `kinds`
    are the (SOP class, syntax) pairs to propose from the start, if they are known.
    """
    connection: _Connection | None = None
    proposed = list(kinds)
    try:
        for item in items:
            try:
                image = _Image(item)
            except (*HOSTILE, OSError):  # not DICOM, or a data set that cannot be encoded
                yield Sent(item, None, UNREADABLE)
                continue
            kind = (image.sop_class, image.syntax)
            if connection is None or not connection.is_open or kind not in proposed:
                if connection is not None:
                    connection.close()
                proposed = (proposed if kind in proposed else [*proposed, kind])[-MAX_CONTEXTS:]
                connection = _Connection(host, port, called_aet, calling_aet, proposed, tls)
            yield Sent(item, *_store(connection, image))
    finally:
        if connection is not None:
            connection.close()


def report_commitment(
    information: Dataset,
    event_type: int,
    host: str,
    port: int,
    called_aet: str,
    calling_aet: str,
    tls: ssl.SSLContext | None = None,
) -> int | None:
    """Send one N-EVENT-REPORT of storage commitment (PS3.4 J.3.3) and return its status; None without answer."""
    kinds = [(STORAGE_COMMITMENT, EXPLICIT_LE), (STORAGE_COMMITMENT, IMPLICIT_LE)]
    connection = _Connection(host, port, called_aet, calling_aet, kinds, tls, provider_of=STORAGE_COMMITMENT)
    try:
        accepted = [context for context in connection.association.accepted_contexts if context.as_scp]
        if not connection.is_open or not accepted or accepted[0].context_id is None:
            return None
        request = N_EVENT_REPORT()
        request.MessageID, request.EventTypeID = 1, event_type
        request.AffectedSOPClassUID = UID(STORAGE_COMMITMENT)
        request.AffectedSOPInstanceUID = UID(COMMITMENT_INSTANCE)
        encoded = encode(information, str(accepted[0].transfer_syntax[0]) == IMPLICIT_LE, True)
        request.EventInformation = io.BytesIO(encoded or b"")
        return connection.exchange(request, accepted[0].context_id)
    finally:
        connection.close()


class _Connection:
    """An association, established or not; `provider_of` is a SOP class for which we are the SCP (PS3.7 D.3.3.4)."""

    def __init__(
        self,
        host: str,
        port: int,
        called: str,
        calling: str,
        kinds: list[tuple[str, str]],
        tls: ssl.SSLContext | None,
        provider_of: str | None = None,
    ):
        entity = AE(calling)
        entity.maximum_pdu_size = LARGEST_PDU
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = TIMEOUT
        contexts = [build_context(sop_class, [syntax]) for sop_class, syntax in kinds]
        roles: list = [build_role(provider_of, scp_role=True)] if provider_of else []
        tls_args = (tls, host) if tls else None
        self.association = entity.associate(
            host, port, contexts=contexts, ae_title=called, ext_neg=roles, tls_args=tls_args
        )
        self._pause = pause_reactor(self.association) if self.association.is_established else None

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent: the peer accepted the association and has not ended it."""
        return self.association.is_established and self.association.dul.state_machine.current_state == TRANSFER

    def exchange(self, request: C_STORE | N_EVENT_REPORT, context: int) -> int | None:
        """Send one request and return the status of its answer; without an answer, abort and return None."""
        self.association.dimse.send_msg(request, context)
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            try:
                return getattr(self.association.dimse.msg_queue.get(timeout=0.2)[1], "Status", None)
            except queue.Empty:
                if not self.is_open:  # the library would wait for the answer until its timeout
                    return None
        self.association.abort()
        return None

    def close(self) -> None:
        """Release the association if it is open, and let the library handle the peer's last messages."""
        if self.is_open:
            self.association.release()
        if self._pause:
            self._pause.over.set()


def _store(connection: _Connection, image: _Image) -> tuple[int | None, str]:
    """Send the image's own bytes and return (status, reason); send_c_store would decode and encode the image again."""
    association = connection.association
    # when the peer accepts no context, the library aborts the association, but keeps the peer's answer
    if not connection.is_open:
        refused = association.rejected_contexts and not association.accepted_contexts
        return None, NO_CONTEXT if refused else NO_ASSOCIATION
    accepted = [
        context
        for context in association.accepted_contexts
        if context.abstract_syntax == image.sop_class and str(context.transfer_syntax[0]) == image.syntax
    ]
    if not accepted or accepted[0].context_id is None:
        return None, NO_CONTEXT
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = UID(image.sop_class), UID(image.sop_uid)
    request.DataSet = io.BytesIO(image.data)
    status = connection.exchange(request, accepted[0].context_id)
    return status, "" if status is not None else NO_ANSWER
