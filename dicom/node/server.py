"""The TCP server of the node: allowed addresses, limits on connections, and the time to start an association.

Handles a connection up to its first byte: addresses, limits, TLS handshake. Must not import DIMSE or inbox modules.
"""

import ipaddress
import logging
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
from dicom.node.socket_reader import has_bytes

HALF_OPEN = 128  # connections at once without an association; each one costs a sleeping thread
HALF_OPEN_PEER = 96  # of one address, so that a single peer cannot block the others


@dataclass(frozen=True)
class Node:
    """AE title, address and limits of the node; an empty allow list allows every peer."""

    aet: str = "CXRLOOP"
    host: str = "127.0.0.1"
    port: int = 11112  # 0: any free port
    allow_aet: tuple[str, ...] = ()
    allow_ip: tuple[str, ...] = ()  # addresses or networks, "10.1.0.0/16"
    max_associations: int = 32
    max_per_peer: int = 32  # associations at once from one address
    context: ssl.SSLContext | None = None  # if set, the port accepts TLS only
    artim: float = 10  # seconds to send the A-ASSOCIATE-RQ, TLS handshake included (PS3.8 9.1.5)
    idle: float = 60  # seconds without a byte before an association is dropped
    stall: float = 30  # seconds in which a message must bring PACE bytes (dicom/node/socket_reader.py)

    def __post_init__(self) -> None:
        self.networks()  # reject a wrong address at the start, not at the first connection

    def networks(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        """Return `allow_ip` as networks; IPv4 networks written as IPv6 (::ffff:10.1.0.0/112) too. Raises ValueError."""
        return tuple(_as_ipv4(ipaddress.ip_network(text, strict=False)) for text in self.allow_ip)


class NodeServer(ThreadedAssociationServer):
    """Accepts connections; each one does its TLS handshake and waits for its first byte in its own thread."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, node: Node, entity: AE, refusals: Refusals, log: logging.Logger, handlers: list[Any]):
        self._networks = node.networks()
        self._tls, self._artim, self._refusals, self._log = node.context, node.artim, refusals, log
        self._half_open: dict[Any, Association | None] = {}  # by address; None until the first byte
        self._half_open_lock = threading.Lock()
        handlers = [(evt.EVT_CONN_OPEN, self._association_created), *handlers]
        address = (node.host, node.port)
        super().__init__(entity, address, entity.ae_title, entity.supported_contexts, evt_handlers=handlers)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return False to close a connection before a byte is read: address not allowed, or too many connections."""
        peer = client_address[0]
        if not self._allowed(peer):
            self._refusals.note(peer, "address", "not in node.allow_ip")
            return False
        with self._half_open_lock:
            self._half_open = {
                address: association
                for address, association in self._half_open.items()
                if association is None or _is_half_open(association)
            }
            from_peer = sum(address[0] == peer for address in self._half_open)
            full = len(self._half_open) >= HALF_OPEN or from_peer >= HALF_OPEN_PEER
            if not full:
                self._half_open[client_address] = None
        if full:
            self._refusals.note(peer, "connection", "too many connections without an association")
        return not full

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Do the handshake and wait for the first byte; only then create an association with its threads."""
        peer = client_address[0]
        try:
            wire, has_data = request, has_bytes(request, self._artim)
            if has_data and not request.recv(1, MSG_PEEK):  # closed without a byte: a health check, not a refusal
                self.shutdown_request(request)
                return
            if has_data and self._tls:
                wire = self._handshake(request, self._tls)
                has_data = has_bytes(wire, self._artim)
            if has_data:
                self.finish_request(wire, client_address)
                return
            self._refusals.note(peer, "silent", f"sent nothing within {self._artim:g} s")
            self.shutdown_request(wire)
        except OSError as error:  # includes ssl.SSLError
            kind = "TLS" if self._tls else "connection"
            self._refusals.note(peer, kind, getattr(error, "reason", None) or type(error).__name__)
            self.shutdown_request(request)
        except Exception:  # noqa: BLE001 - an error in one connection must not close the port
            self.handle_error(request, client_address)
            self.shutdown_request(request)
        finally:
            with self._half_open_lock:
                if self._half_open.get(client_address) is None:  # else it counts until its association is accepted
                    self._half_open.pop(client_address, None)

    def _association_created(self, event: Any) -> None:
        """Remember the association of a connection; its threads start afterwards."""
        with self._half_open_lock:
            self._half_open[event.address] = event.assoc

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an internal error in one connection, instead of printing it; the port stays open."""
        self._log.exception("connection from %s failed", client_address[0])

    def service_actions(self) -> None:
        """Log the sums of refusals, between connections."""
        super().service_actions()
        self._refusals.flush()

    def shutdown(self) -> None:
        """Stop accepting connections and free the port; associations continue."""
        socketserver.BaseServer.shutdown(self)
        self.server_close()

    def _allowed(self, peer: str) -> bool:
        address = ipaddress.ip_address(peer)
        mapped = getattr(address, "ipv4_mapped", None)
        return not self._networks or any((mapped or address) in network for network in self._networks)

    def _handshake(self, request: socket, context: ssl.SSLContext) -> socket:
        """Return the TLS socket after the handshake. Raises OSError, ssl.SSLError."""
        request.settimeout(self._artim)  # of the whole handshake
        wire = context.wrap_socket(request, server_side=True)
        wire.settimeout(None)
        return wire


def _as_ipv4(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    return ipaddress.IPv4Network((mapped, network.prefixlen - 96)) if mapped and network.prefixlen >= 96 else network


def _is_half_open(association: Association) -> bool:
    """Return True until the association is accepted or has ended; also before its thread has started."""
    return not association.is_established and (association.ident is None or association.is_alive())
