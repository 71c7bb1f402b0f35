"""Opens an association to a peer, with limits on what the peer may send, and explains a failure.

Independent of the service: the caller chooses presentation contexts and messages.
"""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from socket import IPPROTO_TCP, TCP_NODELAY
from typing import Any, cast

from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.events import Event
from pynetdicom.presentation import PresentationContext

from dicom.client.archive import MAX_IMAGE
from dicom.client.reactor_pause import pause_reactor
from dicom.errors import ArchiveBusy, ArchiveUnusable

LARGEST_PDU = 131072  # bytes
CONNECT = 10  # seconds to open a connection, and to accept an association
SILENCE = 120  # seconds without a message before an answer is given up; an image on tape takes long


@dataclass(frozen=True)
class Peer:
    """Address and titles of a peer; with `tls`, over TLS only."""

    aet: str
    host: str
    port: int
    calling: str = "CXRLOOP"  # our AE title
    tls: ssl.SSLContext | None = None

    def __str__(self) -> str:
        return f"{self.aet}@{self.host}:{self.port}"


class ReceiveLimit:
    """Limits the bytes of one PDU and one message, because the library reads them into memory at any length."""

    def __init__(self) -> None:
        self.connected = self.too_long = False
        self._received = 0

    def opened(self, event: Event) -> None:
        """Limit every read of the new connection, and send without delay."""
        self.connected = True
        socket = cast(Any, event.assoc.dul.socket)
        # a request is two small PDUs: without this the second waits 40 ms for the peer's delayed acknowledgement
        socket.socket.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        receive = socket.recv

        def limited(count: int) -> bytearray:
            self._received += count
            if count > LARGEST_PDU or self._received > MAX_IMAGE:
                self.too_long = True
                raise OSError("the peer sends more than the limit")
            return receive(count)

        socket.recv = limited

    def message(self, event: Event) -> None:
        """Restart the count after a complete message."""
        self._received = 0


@contextmanager
def associated(
    peer: Peer, contexts: list[PresentationContext], roles: list[Any] | None = None, handlers: list[Any] | None = None
) -> Iterator[tuple[Association, ReceiveLimit]]:
    """Open an association; release it at the end of the block, abort it when the block raises.

    Raises ArchiveUnusable, ArchiveBusy.
    """
    entity = AE(peer.calling)
    entity.maximum_pdu_size = LARGEST_PDU
    entity.connection_timeout = entity.acse_timeout = CONNECT
    entity.dimse_timeout = entity.network_timeout = SILENCE
    limit = ReceiveLimit()
    tls = (peer.tls, peer.host) if peer.tls else None
    own_handlers = [(evt.EVT_CONN_OPEN, limit.opened), (evt.EVT_DIMSE_RECV, limit.message)]
    try:
        association = entity.associate(
            peer.host, peer.port, contexts=contexts, ae_title=peer.aet, ext_neg=roles or [],
            tls_args=cast(Any, tls), evt_handlers=[*own_handlers, *(handlers or [])],
        )  # fmt: skip
    except OSError:  # socket.gaierror
        raise ArchiveUnusable(f"{peer}: the host name has no address") from None
    if not association.is_established:
        raise _failure(peer, association, limit)
    pause = pause_reactor(association)
    released = False
    try:
        yield association, limit
        association.release()
        released = True
    finally:
        if not released:
            association.abort()
        pause.over.set()


def _failure(peer: Peer, association: Association, limit: ReceiveLimit) -> Exception:
    """Return the exception for a failed association, with advice (PS3.8 9.3.4)."""
    if not limit.connected:
        hint = ", or its certificate is not trusted" if peer.tls else ""
        return ArchiveBusy(f"{peer} does not answer: no program listens there, or a firewall blocks it{hint}")
    answer = association.acceptor.primitive
    if not association.is_rejected or answer is None:
        if association.rejected_contexts:
            return ArchiveUnusable(f"{peer} accepts none of the presentation contexts for {peer.calling}")
        return ArchiveBusy(f"{peer} closed the connection on the association request")
    if (answer.result_source, answer.diagnostic) == (1, 7):
        return ArchiveUnusable(f"{peer} does not have the AE title {peer.aet}: use its own AE title")
    if (answer.result_source, answer.diagnostic) == (1, 3):
        return ArchiveUnusable(f"{peer} does not know our AE title {peer.calling}: add it there")
    why = f"{peer} rejects the association: {answer.reason_str}"
    return ArchiveBusy(why) if answer.result == 2 else ArchiveUnusable(why)
