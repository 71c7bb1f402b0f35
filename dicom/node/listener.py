"""The listener of the node: C-ECHO, and C-STORE into the inbox. Success is sent only when the image is durable there.

Decodes no pixels. Log lines name inbox files, sizes and peers, never a patient. Must not import a ledger.
"""

import logging
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.events import Event
from pynetdicom.pdu_primitives import A_ASSOCIATE

from dicom.dataset.facts import SOP_CLASSES, VERIFICATION
from dicom.dataset.part10 import IMPLEMENTATION_NAME, IMPLEMENTATION_UID
from dicom.dataset.syntaxes import SYNTAXES
from dicom.node.dimse_command import Command
from dicom.node.pdu_reader import LARGEST_PDU, PduReader
from dicom.node.reception import Reception, Response
from dicom.node.refusals import Refusals
from dicom.node.server import Node, NodeServer
from dicom.store.inbox import Inbox

__all__ = ["Listener", "Node", "Service"]

GRACE = 3  # seconds for running transfers to finish when the listener stops
DICOM = "1.2.840.10008.3.1.1.1"  # application context name (PS3.7 A.2.1)
OTHER_APPLICATION = (1, 1, 2)  # permanent, by the service user: application context name not supported
TRANSIENT, PRESENTATION, CONGESTION, LOCAL_LIMIT = 2, 3, 1, 2  # A-ASSOCIATE-RJ (PS3.8 table 9-21)


@dataclass(frozen=True)
class Service:
    """One more SOP class of the node, with pynetdicom handlers: (event, callable)."""

    sop_class: str
    syntaxes: tuple[str, ...]
    handlers: tuple[tuple[Any, Callable[[Event], Any]], ...]


class Listener:
    """The node's port, in threads of this process, from `start()` to `stop()`.

    `full` returns why no new association may store anything now, or None; it is called for each association.
    """

    def __init__(
        self,
        node: Node,
        inbox: Inbox,
        log: logging.Logger | None = None,
        services: tuple[Service, ...] = (),
        full: Callable[[], str | None] | None = None,
    ):
        self._node, self._inbox, self._services = node, inbox, services
        self._full = full or (lambda: None)
        self._log = log or logging.getLogger("cxrloop.listen")
        self.refusals = Refusals(self._log)
        self._server: NodeServer | None = None
        self._active: list[Association] = []
        self._active_lock = threading.Lock()

    @property
    def port(self) -> int:
        """The port in use, also when the settings ask for any free port."""
        if self._server is None:
            raise RuntimeError("the listener is not started")
        return self._server.server_address[1]

    def start(self) -> None:
        """Remove incomplete files and open the port. Raises OSError when another program uses it."""
        removed = self._inbox.sweep()
        if removed:
            self._log.info("removed %d unfinished transfers", removed)
        # messages of the libraries contain UIDs and element values; ours do not
        for library in ("pynetdicom", "pydicom"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", category=UserWarning, module="pydicom")
        handlers: list[Any] = [
            (evt.EVT_REQUESTED, self._accept_or_reject),
            (evt.EVT_CONN_OPEN, self._connected),
            (evt.EVT_REJECTED, self._rejected),
        ]
        for service in self._services:
            handlers.extend(service.handlers)
        server = self._server = NodeServer(self._node, self._entity(), self.refusals, self._log, handlers)
        threading.Thread(target=server.serve_forever, args=(0.1,), name="dicom-port", daemon=True).start()
        self._log.info("listening as %s on %s:%d", self._node.aet, self._node.host, self.port)

    def stop(self) -> None:
        """Close the port, wait GRACE seconds for running transfers, abort the rest."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.shutdown()
        deadline = time.monotonic() + GRACE
        while any(association.is_established for association in server.active_associations):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        for association in server.active_associations:
            if not association.is_established and association.dul.socket and association.dul.socket.socket:
                server.shutdown_request(association.dul.socket.socket)  # not accepted yet: there is nothing to abort
        established = [association for association in server.active_associations if association.is_established]
        aborts = [threading.Thread(target=association.abort, daemon=True) for association in established]
        for abort in aborts:
            abort.start()
        for abort in aborts:
            abort.join(GRACE)

    def _entity(self) -> AE:
        entity = AE(self._node.aet)
        entity.require_called_aet = True
        entity.require_calling_aet = list(self._node.allow_aet)
        entity.maximum_associations = 1 << 16  # _accept_or_reject counts: the library counts silent connections too
        entity.maximum_pdu_size = LARGEST_PDU
        entity.acse_timeout = self._node.artim
        entity.dimse_timeout = entity.network_timeout = self._node.idle
        entity.implementation_class_uid = IMPLEMENTATION_UID
        entity.implementation_version_name = IMPLEMENTATION_NAME
        entity.add_supported_context(VERIFICATION)
        for sop_class in SOP_CLASSES:
            entity.add_supported_context(sop_class, list(SYNTAXES))
        for service in self._services:
            entity.add_supported_context(service.sop_class, list(service.syntaxes))
        return entity

    def _connected(self, event: Event) -> None:
        PduReader(event.assoc, self, self._node.stall).install()

    def _accept_or_reject(self, event: Event) -> None:
        """Accept an association, or reject it at the association limit or the disk limit (PS3.8 9.3.4)."""
        association, peer = event.assoc, str(event.assoc.requestor.address)
        request = cast(A_ASSOCIATE, association.requestor.primitive)
        if request.application_context_name != DICOM:
            self.refusals.note(peer, "association 1/1/2", "application context is not DICOM's")
            association.acse.send_reject(*OTHER_APPLICATION)
            return association.kill()
        stores = any(context.abstract_syntax in SOP_CLASSES for context in request.presentation_context_definition_list)
        why, reason = self._full() if stores else None, CONGESTION
        with self._active_lock:
            self._active = [active for active in self._active if _is_active(active)]
            from_peer = sum(active.requestor.address == peer for active in self._active)
            if len(self._active) >= self._node.max_associations:
                why, reason = f"{len(self._active)} associations are open: node.max_associations", LOCAL_LIMIT
            elif from_peer >= self._node.max_per_peer:
                why, reason = f"{from_peer} associations are open from this address: node.max_per_peer", LOCAL_LIMIT
            if not why:
                self._active.append(association)
                return
        self.refusals.note(peer, f"association {TRANSIENT}/{PRESENTATION}/{reason}", why)
        association.acse.send_reject(TRANSIENT, PRESENTATION, reason)
        association.kill()

    def _rejected(self, event: Event) -> None:
        peer = event.assoc.requestor
        title = "called or calling AE title not allowed"
        self.refusals.note(str(peer.address), "association 1/1", f"{title}, calling {peer.ae_title!r}")

    # StorageHandler of the PDU readers (dicom/node/pdu_reader.py)

    def begin(self, command: Command, sop_class: str, syntax: str) -> Reception:
        """Start the reception of one object."""
        return Reception(self._inbox, command, sop_class, syntax)

    def completed(self, association: Association, response: Response, size: int) -> None:
        """Log a stored object, or count its refusal."""
        peer = association.requestor
        if response.path:
            self._log.info("received %s, %d bytes, from %r %s", response.path.name, size, peer.ae_title, peer.address)
        else:
            self.refusals.note(str(peer.address), f"{response.status:04X}", f"{response.why}, from {peer.ae_title!r}")

    def interrupted(self, association: Association, size: int, why: str) -> None:
        """Count an object, or another message, that was not received completely."""
        peer = association.requestor
        self.refusals.note(str(peer.address), "unfinished", f"{why} after {size} bytes, from {peer.ae_title!r}")


def _is_active(association: Association) -> bool:
    ended = association.is_released or association.is_aborted or association.is_rejected
    return association.is_alive() and not ended
