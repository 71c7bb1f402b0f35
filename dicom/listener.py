"""The DICOM port: C-ECHO, and C-STORE into the inbox; Success is said only when the film is durable there.

No ledger, no pixels, no judgement of content. Log lines name inbox files, sizes and peers, never a patient.
"""

import io
import ipaddress
import logging
import socketserver
import threading
import time
import warnings
from dataclasses import dataclass
from typing import Any, cast

from pynetdicom import AE, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.events import Event
from pynetdicom.sop_class import Verification  # pyright: ignore[reportAttributeAccessIssue]
from pynetdicom.transport import ThreadedAssociationServer

from dicom.image import SOP_CLASSES
from dicom.inbox import Inbox
from dicom.part10 import IMPLEMENTATION_NAME, IMPLEMENTATION_UID, file_meta
from dicom.reception import OUT_OF_RESOURCES, SUCCESS, answer
from dicom.syntaxes import SYNTAXES

LARGEST_PDU = 131072  # bytes; the most that dcmtk senders use, 8 times the default, and several times its speed
ARTIM = 10  # seconds that a peer has to say who it is
IDLE = 60  # seconds without a byte before an association is dropped
GRACE = 3  # seconds that transfers get to end when the listener stops


@dataclass(frozen=True)
class Node:
    """Who we are on the network and whom we listen to; an empty allow list lets everyone in."""

    aet: str = "CXRLOOP"
    host: str = "127.0.0.1"
    port: int = 11112  # 0: any free one
    allow_aet: tuple[str, ...] = ()
    allow_ip: tuple[str, ...] = ()  # addresses or networks, "10.1.0.0/16"
    max_associations: int = 32


class _Server(ThreadedAssociationServer):
    daemon_threads = True
    request_queue_size = 128
    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()
    log: logging.Logger

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Drop a connection from an address that is not on the list, before a byte is read."""
        address = ipaddress.ip_address(client_address[0])
        mapped = getattr(address, "ipv4_mapped", None)
        if not self.networks or any((mapped or address) in network for network in self.networks):
            return True
        self.log.warning("connection from %s refused: not in node.allow_ip", address)
        return False

    def shutdown(self) -> None:
        socketserver.BaseServer.shutdown(self)
        self.server_close()


class Listener:
    """The node's port, in threads of this process, from `start()` to `stop()`."""

    def __init__(self, node: Node, inbox: Inbox, log: logging.Logger | None = None):
        self._node, self._inbox = node, inbox
        self._log = log or logging.getLogger("cxrloop.listen")
        self._server: _Server | None = None
        self._networks = tuple(ipaddress.ip_network(text, strict=False) for text in node.allow_ip)

    @property
    def port(self) -> int:
        """The port that is listened on, also where the node asked for any."""
        if self._server is None:
            raise RuntimeError("the listener is not started")
        return self._server.server_address[1]

    def start(self) -> None:
        """Sweep left-over temps and open the port. Raises OSError when it is taken."""
        swept = self._inbox.sweep()
        if swept:
            self._log.info("swept %d unfinished transfers", swept)
        # the libraries' own messages print UIDs and element values; ours are the ones that go to the log
        for library in ("pynetdicom", "pydicom"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", category=UserWarning, module="pydicom")
        server = self._entity().make_server(
            (self._node.host, self._node.port),
            server_class=_Server,
            evt_handlers=[(evt.EVT_C_STORE, self._store), (evt.EVT_REJECTED, self._rejected)],
        )
        assert isinstance(server, _Server)
        server.networks, server.log = self._networks, self._log
        self._server = server
        threading.Thread(target=server.serve_forever, args=(0.1,), name="dicom-port", daemon=True).start()
        self._log.info("listening as %s on %s:%d", self._node.aet, self._node.host, self.port)

    def stop(self) -> None:
        """Close the port, give running transfers a moment, abort the rest."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.shutdown()
        deadline = time.monotonic() + GRACE
        while any(association.is_established for association in server.active_associations):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        aborts = [threading.Thread(target=one.abort, daemon=True) for one in server.active_associations]
        for abort in aborts:
            abort.start()
        for abort in aborts:
            abort.join(GRACE)

    def _entity(self) -> AE:
        entity = AE(self._node.aet)
        entity.require_called_aet = True
        entity.require_calling_aet = list(self._node.allow_aet)
        entity.maximum_associations = self._node.max_associations
        entity.maximum_pdu_size = LARGEST_PDU
        entity.acse_timeout, entity.dimse_timeout, entity.network_timeout = ARTIM, IDLE, IDLE
        entity.implementation_class_uid = IMPLEMENTATION_UID
        entity.implementation_version_name = IMPLEMENTATION_NAME
        entity.add_supported_context(Verification)
        for sop_class in SOP_CLASSES:
            entity.add_supported_context(sop_class, list(SYNTAXES))
        return entity

    def _rejected(self, event: Event) -> None:
        peer = event.assoc.requestor
        self._log.warning("association of %r from %s rejected", peer.ae_title, peer.address)

    def _store(self, event: Event) -> int:
        """Status for one C-STORE: what the header says, then what the disk says."""
        request, peer = cast(C_STORE, event.request), event.assoc.requestor
        syntax = str(event.context.transfer_syntax)
        sop_class, sop_uid = str(request.AffectedSOPClassUID or ""), str(request.AffectedSOPInstanceUID or "")
        received = request.DataSet or io.BytesIO()
        received.seek(0)
        status, why = answer(received, syntax, sop_class, sop_uid)
        if status != SUCCESS:
            self._log.warning("refused %04X from %r %s: %s", status, peer.ae_title, peer.address, why)
            return status
        data = received.getbuffer()
        try:
            path = self._inbox.put_parts([file_meta(sop_class.strip("\0 "), sop_uid.strip("\0 "), syntax), data])
        except OSError as error:
            self._log.error("refused %04X from %r: disk: %s", OUT_OF_RESOURCES, peer.ae_title, error.strerror)
            return OUT_OF_RESOURCES
        self._log.info("received %s, %d bytes, from %r %s", path.name, len(data), peer.ae_title, peer.address)
        return SUCCESS
