"""A small client of other nodes: C-STORE of images as they are, byte for byte, C-ECHO, N-EVENT-REPORT.

For imports, results, storage commitment, the demo's PACS and tests; retries nothing and remembers nothing.
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

from dicom.client.reactor_pause import resting
from dicom.dataset import header
from dicom.dataset.part10 import EXPLICIT_LE, HOSTILE, IMPLICIT_LE, open_envelope, read_header
from dicom.errors import Unreadable

VERIFICATION = "1.2.840.10008.1.1"
STORAGE_COMMITMENT = "1.2.840.10008.1.20.1"
COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1.1"  # PS3.4 J.3.5: the well-known instance
REJECTED_TRANSIENT = 2  # result of an A-ASSOCIATE-RJ (PS3.8 table 9-21)
LARGEST_PDU = 131072
MAX_CONTEXTS = 128  # PS3.8: odd identifiers from 1 to 255
TIMEOUT = 30  # seconds for an answer
TRANSFER = "Sta6"  # PS3.8 9.2.1: association established, ready for data transfer
UNREADABLE, NO_ASSOCIATION, NO_CONTEXT, NO_ANSWER = "unreadable", "no association", "no accepted context", "no answer"


@dataclass(frozen=True)
class Sent:
    """What became of one item: its C-STORE status, or None and in `why` what was missing."""

    item: Path | Dataset
    status: int | None
    why: str = ""


class _Image:
    """One item to send: data set bytes with the UIDs that its command needs."""

    def __init__(self, item: Path | Dataset):
        if isinstance(item, Dataset):
            buffer = io.BytesIO()
            dcmwrite(buffer, item, enforce_file_format=True)
            whole = buffer.getvalue()
        else:
            whole = item.read_bytes()
        stream = io.BytesIO(whole)
        envelope = open_envelope(stream)
        found = read_header(stream, envelope.transfer_syntax).dataset
        self.syntax = envelope.transfer_syntax
        self.sop_class, self.sop_uid = header.text(found, "SOPClassUID"), header.text(found, "SOPInstanceUID")
        self.data = whole[envelope.offset :]
        if not self.sop_class or not self.sop_uid:
            raise Unreadable("no SOP class or instance UID")


def echo(
    host: str, port: int, called_aet: str, calling_aet: str = "CXRSEND", tls: ssl.SSLContext | None = None
) -> bool:
    """True when the node at host:port answers C-ECHO with Success; over TLS when there is a context."""
    line = _Line(host, port, called_aet, calling_aet, [(VERIFICATION, IMPLICIT_LE)], tls)
    try:
        return line.up and line.association.send_c_echo().get("Status") == 0
    finally:
        line.close()


def is_running(
    host: str, port: int, called_aet: str, calling_aet: str = "CXRSEND", tls: ssl.SSLContext | None = None
) -> bool:
    """True when the node at host:port is at work: it answers C-ECHO, or refuses for now since its seats are taken."""
    line = _Line(host, port, called_aet, calling_aet, [(VERIFICATION, IMPLICIT_LE)], tls)
    try:
        said = line.association.acceptor.primitive
        if line.association.is_rejected and said is not None:
            return said.result == REJECTED_TRANSIENT
        return line.up and line.association.send_c_echo().get("Status") == 0
    finally:
        line.close()


def send(
    items: Iterable[Path | Dataset],
    host: str,
    port: int,
    called_aet: str,
    calling_aet: str = "CXRSEND",
    tls: ssl.SSLContext | None = None,
) -> Iterator[tuple[Path | Dataset, int | None]]:
    """Each item with its C-STORE status; None when it could not be read, or was not accepted or answered."""
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
    """What became of each item, in order; a refused or unanswered one does not keep the next from being sent.

    One association for as long as it lasts and its contexts fit; each syntax is proposed in a context of its own.
    `kinds` are the (SOP class, syntax) to be proposed from the start, where they are known.
    """
    line: _Line | None = None
    proposed = list(kinds)
    try:
        for item in items:
            try:
                image = _Image(item)
            except (*HOSTILE, OSError):  # not DICOM, or a data set that can't be encoded
                yield Sent(item, None, UNREADABLE)
                continue
            kind = (image.sop_class, image.syntax)
            if line is None or not line.up or kind not in proposed:
                if line is not None:
                    line.close()
                proposed = (proposed if kind in proposed else [*proposed, kind])[-MAX_CONTEXTS:]
                line = _Line(host, port, called_aet, calling_aet, proposed, tls)
            yield Sent(item, *_store(line, image))
    finally:
        if line is not None:
            line.close()


def report_commitment(
    information: Dataset,
    event_type: int,
    host: str,
    port: int,
    called_aet: str,
    calling_aet: str,
    tls: ssl.SSLContext | None = None,
) -> int | None:
    """Status of one N-EVENT-REPORT of storage commitment, sent in the provider's role (PS3.4 J.3.3); None: no answer."""
    kinds = [(STORAGE_COMMITMENT, EXPLICIT_LE), (STORAGE_COMMITMENT, IMPLICIT_LE)]
    line = _Line(host, port, called_aet, calling_aet, kinds, tls, provider_of=STORAGE_COMMITMENT)
    try:
        accepted = [context for context in line.association.accepted_contexts if context.as_scp]
        if not line.up or not accepted or accepted[0].context_id is None:
            return None
        request = N_EVENT_REPORT()
        request.MessageID, request.EventTypeID = 1, event_type
        request.AffectedSOPClassUID = UID(STORAGE_COMMITMENT)
        request.AffectedSOPInstanceUID = UID(COMMITMENT_INSTANCE)
        encoded = encode(information, str(accepted[0].transfer_syntax[0]) == IMPLICIT_LE, True)
        request.EventInformation = io.BytesIO(encoded or b"")
        return line.exchange(request, accepted[0].context_id)
    finally:
        line.close()


class _Line:
    """An association, established or not; `provider_of` is a SOP class in which we take the SCP's role (PS3.7 D.3.3.4)."""

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
        wire = (tls, host) if tls else None
        self.association = entity.associate(
            host, port, contexts=contexts, ae_title=called, ext_neg=roles, tls_args=wire
        )
        self._rest = resting(self.association) if self.association.is_established else None

    @property
    def up(self) -> bool:
        """Whether it can carry a message: the peer neither refused it nor ended it since."""
        return self.association.is_established and self.association.dul.state_machine.current_state == TRANSFER

    def exchange(self, request: C_STORE | N_EVENT_REPORT, context: int) -> int | None:
        """Send one request and wait for its answer's status; None when none comes (the association is then aborted)."""
        self.association.dimse.send_msg(request, context)
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            try:
                return getattr(self.association.dimse.msg_queue.get(timeout=0.2)[1], "Status", None)
            except queue.Empty:
                if not self.up:  # a dead line: the library would wait for the answer in vain
                    return None
        self.association.abort()
        return None

    def close(self) -> None:
        """Release it, if the peer has not ended it; what the peer said last is then the library's to answer."""
        if self.up:
            self.association.release()
        if self._rest:
            self._rest.over.set()


def _store(line: _Line, image: _Image) -> tuple[int | None, str]:
    """Status, or why there is none. The image's own bytes go: the library's send_c_store would decode and encode them."""
    association = line.association
    # a peer that accepts no context at all is left by the library, and what it answered stays
    if not line.up:
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
    status = line.exchange(request, accepted[0].context_id)
    return status, "" if status is not None else NO_ANSWER
