"""A small client of other nodes: C-STORE of films as they are, byte for byte, C-ECHO, N-EVENT-REPORT.

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
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE, N_EVENT_REPORT
from pynetdicom.dsutils import encode

from dicom import header
from dicom.part10 import EXPLICIT_LE, HOSTILE, IMPLICIT_LE, Unreadable, open_envelope, read_header

VERIFICATION = "1.2.840.10008.1.1"
STORAGE_COMMITMENT = "1.2.840.10008.1.20.1"
COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1.1"  # PS3.4 J.3.5: the well-known instance
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


class _Film:
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
    association = _associate(host, port, called_aet, calling_aet, [(VERIFICATION, IMPLICIT_LE)], tls)
    if not association.is_established:
        return False
    status = association.send_c_echo()
    association.release()
    return status.get("Status") == 0


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
    association: Association | None = None
    proposed = list(kinds)
    try:
        for item in items:
            try:
                film = _Film(item)
            except (*HOSTILE, OSError):  # not DICOM, or a data set that can't be encoded
                yield Sent(item, None, UNREADABLE)
                continue
            kind = (film.sop_class, film.syntax)
            if association is None or not association.is_established or kind not in proposed:
                if association is not None and association.is_established:
                    association.release()
                proposed = (proposed if kind in proposed else [*proposed, kind])[-MAX_CONTEXTS:]
                association = _associate(host, port, called_aet, calling_aet, proposed, tls)
            yield Sent(item, *_store(association, film))
    finally:
        if association is not None and association.is_established:
            association.release()


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
    association = _associate(host, port, called_aet, calling_aet, kinds, tls, provider_of=STORAGE_COMMITMENT)
    if not association.is_established:
        return None
    try:
        accepted = [context for context in association.accepted_contexts if context.as_scp]
        if not accepted or accepted[0].context_id is None:
            return None
        request = N_EVENT_REPORT()
        request.MessageID, request.EventTypeID = 1, event_type
        request.AffectedSOPClassUID = UID(STORAGE_COMMITMENT)
        request.AffectedSOPInstanceUID = UID(COMMITMENT_INSTANCE)
        encoded = encode(information, str(accepted[0].transfer_syntax[0]) == IMPLICIT_LE, True)
        request.EventInformation = io.BytesIO(encoded or b"")
        return _exchange(association, request, accepted[0].context_id)
    finally:
        if association.is_established:
            association.release()


def _associate(
    host: str,
    port: int,
    called: str,
    calling: str,
    kinds: list[tuple[str, str]],
    tls: ssl.SSLContext | None,
    provider_of: str | None = None,
) -> Association:
    """An association, established or not; `provider_of` is a SOP class in which we take the SCP's role (PS3.7 D.3.3.4)."""
    entity = AE(calling)
    entity.maximum_pdu_size = LARGEST_PDU
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = TIMEOUT
    contexts = [build_context(sop_class, [syntax]) for sop_class, syntax in kinds]
    roles: list = [build_role(provider_of, scp_role=True)] if provider_of else []
    wire = (tls, host) if tls else None
    return entity.associate(host, port, contexts=contexts, ae_title=called, ext_neg=roles, tls_args=wire)


def _store(association: Association, film: _Film) -> tuple[int | None, str]:
    """Status, or why there is none. The film's own bytes go: the library's send_c_store would decode and encode them."""
    # a peer that accepts no context at all is left by the library, and what it answered stays
    if not association.is_established:
        return (
            None,
            NO_CONTEXT if association.rejected_contexts and not association.accepted_contexts else NO_ASSOCIATION,
        )
    accepted = [
        context
        for context in association.accepted_contexts
        if context.abstract_syntax == film.sop_class and str(context.transfer_syntax[0]) == film.syntax
    ]
    if not accepted or accepted[0].context_id is None:
        return None, NO_CONTEXT
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = UID(film.sop_class), UID(film.sop_uid)
    request.DataSet = io.BytesIO(film.data)
    status = _exchange(association, request, accepted[0].context_id)
    return status, "" if status is not None else NO_ANSWER


def _exchange(association: Association, request: C_STORE | N_EVENT_REPORT, context: int) -> int | None:
    """Send one request and wait for its answer's status; None when none comes (the association is then aborted)."""
    association._reactor_checkpoint.clear()  # as the library's send_* do: nobody else may take the answer
    try:
        while not association._is_paused:
            if not association.is_alive():  # the peer hung up first: the library would wait for ever
                return None
            time.sleep(0.0001)
        association.dimse.send_msg(request, context)
        response = _response(association)
    finally:
        association._reactor_checkpoint.set()
    if response is None:
        association.abort()
        return None
    return getattr(response, "Status", None)


def _response(association: Association) -> object | None:
    """The next message; None when none comes in time or the line is dead (the library would wait for it in vain)."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        try:
            return association.dimse.msg_queue.get(timeout=0.2)[1]
        except queue.Empty:
            if association.dul.state_machine.current_state != TRANSFER:
                break
    return None
