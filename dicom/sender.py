"""A small C-STORE client: sends films as they are, byte for byte, and reports each one's status.

For imports, results, the demo's PACS and tests; retries nothing and remembers nothing.
"""

import io
import queue
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydicom import dcmwrite
from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import AE, build_context
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.sop_class import Verification  # pyright: ignore[reportAttributeAccessIssue]

from dicom import header
from dicom.part10 import Unreadable, open_envelope, read_header

LARGEST_PDU = 131072
MAX_CONTEXTS = 128  # PS3.8: odd identifiers from 1 to 255
TIMEOUT = 30  # seconds for an answer
TRANSFER = "Sta6"  # PS3.8 9.2.1: association established, ready for data transfer


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


def echo(host: str, port: int, called_aet: str, calling_aet: str = "CXRSEND") -> bool:
    """True when the node at host:port answers C-ECHO with Success."""
    entity = _entity(calling_aet)
    entity.add_requested_context(Verification)
    association = entity.associate(host, port, ae_title=called_aet)
    if not association.is_established:
        return False
    status = association.send_c_echo()
    association.release()
    return status.get("Status") == 0


def send(
    items: Iterable[Path | Dataset], host: str, port: int, called_aet: str, calling_aet: str = "CXRSEND"
) -> Iterator[tuple[Path | Dataset, int | None]]:
    """Each item with its C-STORE status; None when it could not be read, or was not accepted or answered.

    One association for as long as it lasts and its contexts fit; each syntax is proposed in a context of its own.
    """
    association: Association | None = None
    proposed: list[tuple[str, str]] = []
    try:
        for item in items:
            try:
                film = _Film(item)
            except (Unreadable, OSError):
                yield item, None
                continue
            kind = (film.sop_class, film.syntax)
            if association is None or not association.is_established or kind not in proposed:
                if association is not None and association.is_established:
                    association.release()
                proposed = (proposed if kind in proposed else [*proposed, kind])[-MAX_CONTEXTS:]
                association = _associate(host, port, called_aet, calling_aet, proposed)
            yield item, _store(association, film) if association.is_established else None
    finally:
        if association is not None and association.is_established:
            association.release()


def _entity(calling_aet: str) -> AE:
    entity = AE(calling_aet)
    entity.maximum_pdu_size = LARGEST_PDU
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = TIMEOUT
    return entity


def _associate(host: str, port: int, called: str, calling: str, kinds: list[tuple[str, str]]) -> Association:
    contexts = [build_context(sop_class, [syntax]) for sop_class, syntax in kinds]
    return _entity(calling).associate(host, port, contexts=contexts, ae_title=called)


def _store(association: Association, film: _Film) -> int | None:
    """Send the film's own bytes: the library's send_c_store would decode and encode them again."""
    accepted = [
        context
        for context in association.accepted_contexts
        if context.abstract_syntax == film.sop_class and str(context.transfer_syntax[0]) == film.syntax
    ]
    if not accepted or accepted[0].context_id is None:
        return None
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = UID(film.sop_class), UID(film.sop_uid)
    request.DataSet = io.BytesIO(film.data)
    association._reactor_checkpoint.clear()  # as send_c_store does: nobody else may take the answer
    while not association._is_paused:
        time.sleep(0.0001)
    association.dimse.send_msg(request, accepted[0].context_id)
    response = _response(association)
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
