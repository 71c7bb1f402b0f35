"""The port: who may connect, how many at once, and how long each may take to say who it is.

Everything before the first PDU is understood: addresses, caps, the TLS handshake, the first byte. No DIMSE, no inbox.
"""

import ipaddress
import logging
import select
import socketserver
import ssl
import threading
from dataclasses import dataclass
from socket import MSG_PEEK, socket
from typing import Any

from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.transport import ThreadedAssociationServer

from dicom.node.refusals import Refusals

HALF_OPEN = 128  # connections at once that have not said who they are; a waiting one costs a sleeping thread
HALF_OPEN_PEER = 96  # of one address, so that one peer alone can't shut the others out


@dataclass(frozen=True)
class Node:
    """Who we are on the network and whom we listen to; an empty allow list lets everyone in."""

    aet: str = "CXRLOOP"
    host: str = "127.0.0.1"
    port: int = 11112  # 0: any free one
    allow_aet: tuple[str, ...] = ()
    allow_ip: tuple[str, ...] = ()  # addresses or networks, "10.1.0.0/16"
    max_associations: int = 32
    max_per_peer: int = 32  # associations at once from one address
    context: ssl.SSLContext | None = None  # with one, the port speaks TLS only
    artim: float = 10  # seconds that a peer has to say who it is, TLS handshake included (PS3.8 9.1.5)
    idle: float = 60  # seconds without a byte before an association is dropped
    stall: float = 30  # seconds in which a message must bring PACE bytes (dicom/node/socket_reader.py)

    def __post_init__(self) -> None:
        self.networks()  # a wrong address is said at the start, not at the first connection

    def networks(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        """`allow_ip` as networks, IPv4 ones also where they are written as IPv6's (::ffff:10.1.0.0/112). ValueError."""
        return tuple(_as_ipv4(ipaddress.ip_network(text, strict=False)) for text in self.allow_ip)


class Port(ThreadedAssociationServer):
    """Accepts connections; each one waits for its first byte, and shakes hands, in a thread of its own."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, node: Node, entity: AE, refusals: Refusals, log: logging.Logger, handlers: list[Any]):
        self._networks = node.networks()
        self._tls, self._artim, self._refusals, self._log = node.context, node.artim, refusals, log
        self._unnamed: dict[Any, Association | None] = {}  # by address; None until the first byte has come
        self._counting = threading.Lock()
        bound = [(evt.EVT_CONN_OPEN, self._begins), *handlers]
        super().__init__(entity, (node.host, node.port), entity.ae_title, entity.supported_contexts, evt_handlers=bound)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """False drops a connection before a byte is read: an address that is not allowed, or one too many."""
        peer = client_address[0]
        if not self._allowed(peer):
            self._refusals.note(peer, "address", "not in node.allow_ip")
            return False
        with self._counting:
            self._unnamed = {where: one for where, one in self._unnamed.items() if one is None or _unnamed(one)}
            own = sum(where[0] == peer for where in self._unnamed)
            full = len(self._unnamed) >= HALF_OPEN or own >= HALF_OPEN_PEER
            if not full:
                self._unnamed[client_address] = None
        if full:
            self._refusals.note(peer, "connection", "too many connections that don't say who they are")
        return not full

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In the connection's own thread: handshake, first byte, and only then an association with its threads."""
        peer = client_address[0]
        try:
            wire, heard = request, _speaks(request, self._artim)
            if heard and not request.recv(1, MSG_PEEK):  # hung up without a word: a health check, no refusal
                self.shutdown_request(request)
                return
            if heard and self._tls:
                wire = self._shaken(request, self._tls)
                heard = _speaks(wire, self._artim)
            if heard:
                self.finish_request(wire, client_address)
                return
            self._refusals.note(peer, "silent", f"nothing said within {self._artim:g} s")
            self.shutdown_request(wire)
        except OSError as error:  # ssl.SSLError is one
            kind = "TLS" if self._tls else "connection"
            self._refusals.note(peer, kind, getattr(error, "reason", None) or type(error).__name__)
            self.shutdown_request(request)
        except Exception:  # noqa: BLE001 - one connection's fault must not close the port
            self.handle_error(request, client_address)
            self.shutdown_request(request)
        finally:
            with self._counting:
                if self._unnamed.get(client_address) is None:  # else it counts until it has said who it is
                    self._unnamed.pop(client_address, None)

    def _begins(self, event: Any) -> None:
        """The library makes an association of the connection; it starts afterwards."""
        with self._counting:
            self._unnamed[event.address] = event.assoc

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A fault of ours in one connection: to the log, not to stderr; the port goes on."""
        self._log.exception("connection from %s failed", client_address[0])

    def service_actions(self) -> None:
        """Between connections: say what was refused."""
        super().service_actions()
        self._refusals.flush()

    def shutdown(self) -> None:
        """Stop accepting and free the port; associations go on."""
        socketserver.BaseServer.shutdown(self)
        self.server_close()

    def _allowed(self, peer: str) -> bool:
        address = ipaddress.ip_address(peer)
        mapped = getattr(address, "ipv4_mapped", None)
        return not self._networks or any((mapped or address) in network for network in self._networks)

    def _shaken(self, request: socket, context: ssl.SSLContext) -> socket:
        """The connection's TLS side, once the peer has shaken hands. Raises OSError, ssl.SSLError."""
        request.settimeout(self._artim)  # of the whole handshake
        wire = context.wrap_socket(request, server_side=True)
        wire.settimeout(None)
        return wire


def _as_ipv4(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    return ipaddress.IPv4Network((mapped, network.prefixlen - 96)) if mapped and network.prefixlen >= 96 else network


def _unnamed(one: Association) -> bool:
    """True until the association is accepted or over: also before its thread has started."""
    return not one.is_established and (one.ident is None or one.is_alive())


def _speaks(wire: socket, seconds: float) -> bool:
    """True as soon as there is something to read, False when there is nothing within `seconds`."""
    if isinstance(wire, ssl.SSLSocket) and wire.pending():
        return True
    waiting = select.poll()
    waiting.register(wire, select.POLLIN)
    return bool(waiting.poll(seconds * 1000))
