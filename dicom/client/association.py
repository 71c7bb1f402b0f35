"""An association that we open: who the peer is, what a refusal means, and bounds on what the peer may send.

Knows no service: which contexts are asked for, and what is said on them, is the caller's.
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
from dicom.client.reactor_pause import resting
from dicom.errors import ArchiveBusy, ArchiveUnusable

LARGEST_PDU = 131072  # bytes
CONNECT = 10  # seconds to open a connection, and to accept an association
SILENCE = 120  # seconds without a message before an answer is given up; an image on tape takes its time


@dataclass(frozen=True)
class Peer:
    """Whom we ask, and under which name; with `tls` over TLS only."""

    aet: str
    host: str
    port: int
    calling: str = "CXRLOOP"
    tls: ssl.SSLContext | None = None

    def __str__(self) -> str:
        return f"{self.aet}@{self.host}:{self.port}"


class Bounds:
    """What the connection has let through. The library reads PDUs and messages of any length into memory; this ends them."""

    def __init__(self) -> None:
        self.connected = self.too_long = False
        self._taken = 0

    def opened(self, event: Event) -> None:
        """Put a bound before every read of the connection that has just been opened, and no delay before its writes."""
        self.connected = True
        socket = cast(Any, event.assoc.dul.socket)
        # a question is two small PDUs: without this the second waits 40 ms for the peer's delayed acknowledgement
        socket.socket.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        receive = socket.recv

        def bounded(count: int) -> bytearray:
            self._taken += count
            if count > LARGEST_PDU or self._taken > MAX_IMAGE:
                self.too_long = True
                raise OSError("more than a peer may send")
            return receive(count)

        socket.recv = bounded

    def message(self, event: Event) -> None:
        """A whole message has come: the count begins anew."""
        self._taken = 0


@contextmanager
def associated(
    peer: Peer, contexts: list[PresentationContext], roles: list[Any] | None = None, handlers: list[Any] | None = None
) -> Iterator[tuple[Association, Bounds]]:
    """An established association, released at the end, aborted when the block raises. Raises ArchiveUnusable, ArchiveBusy."""
    entity = AE(peer.calling)
    entity.maximum_pdu_size = LARGEST_PDU
    entity.connection_timeout = entity.acse_timeout = CONNECT
    entity.dimse_timeout = entity.network_timeout = SILENCE
    bounds = Bounds()
    tls = (peer.tls, peer.host) if peer.tls else None
    watched = [(evt.EVT_CONN_OPEN, bounds.opened), (evt.EVT_DIMSE_RECV, bounds.message)]
    try:
        association = entity.associate(
            peer.host, peer.port, contexts=contexts, ae_title=peer.aet, ext_neg=roles or [],
            tls_args=cast(Any, tls), evt_handlers=[*watched, *(handlers or [])],
        )  # fmt: skip
    except OSError:  # socket.gaierror
        raise ArchiveUnusable(f"{peer}: no address is known for this host name") from None
    if not association.is_established:
        raise _refusal(peer, association, bounds)
    rest = resting(association)
    try:
        yield association, bounds
        association.release()
    except BaseException:
        association.abort()
        raise
    finally:
        rest.over.set()


def _refusal(peer: Peer, association: Association, bounds: Bounds) -> Exception:
    """What a failed association means for the person who asked (PS3.8 9.3.4)."""
    if not bounds.connected:
        hint = ", or its certificate is not trusted" if peer.tls else ""
        return ArchiveBusy(f"{peer} does not answer: nothing listens there, or a firewall is between{hint}")
    said = association.acceptor.primitive
    if not association.is_rejected or said is None:
        if association.rejected_contexts:
            return ArchiveUnusable(f"{peer} offers {peer.calling} none of what we ask for")
        return ArchiveBusy(f"{peer} hung up on the association request")
    if (said.result_source, said.diagnostic) == (1, 7):
        return ArchiveUnusable(f"{peer} does not go by the AE title {peer.aet}: ask with the title it has")
    if (said.result_source, said.diagnostic) == (1, 3):
        return ArchiveUnusable(f"{peer} does not know our AE title {peer.calling}: enter it there")
    why = f"{peer} refuses the association: {said.reason_str}"
    return ArchiveBusy(why) if said.result == 2 else ArchiveUnusable(why)
