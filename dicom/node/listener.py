"""The DICOM port: C-ECHO, and C-STORE into the inbox; Success is said only when the image is durable there.

No ledger, no pixels, no judgement of content. Log lines name inbox files, sizes and peers, never a patient.
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
from pynetdicom.sop_class import Verification  # pyright: ignore[reportAttributeAccessIssue]

from dicom.dataset.facts import SOP_CLASSES
from dicom.dataset.part10 import IMPLEMENTATION_NAME, IMPLEMENTATION_UID
from dicom.dataset.syntaxes import SYNTAXES
from dicom.node.dimse_command import Command
from dicom.node.pdu_reader import LARGEST_PDU, Stream
from dicom.node.reception import Answer, Reception
from dicom.node.refusals import Refusals
from dicom.node.server import Node, Port
from dicom.store.inbox import Inbox

__all__ = ["Listener", "Node", "Service"]

GRACE = 3  # seconds that transfers get to end when the listener stops
DICOM = "1.2.840.10008.3.1.1.1"  # application context name (PS3.7 A.2.1)
OTHER_APPLICATION = (1, 1, 2)  # permanent, by the service user: application context name not supported
TRANSIENT, PRESENTATION, CONGESTION, LOCAL_LIMIT = 2, 3, 1, 2  # A-ASSOCIATE-RJ (PS3.8 table 9-21)


@dataclass(frozen=True)
class Service:
    """One more SOP class that the node answers, with pynetdicom handlers: (event, callable)."""

    sop_class: str
    syntaxes: tuple[str, ...]
    handlers: tuple[tuple[Any, Callable[[Event], Any]], ...]


class Listener:
    """The node's port, in threads of this process, from `start()` to `stop()`.

    `full` says why no new association may store anything now, or None; it is asked at each association.
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
        self._server: Port | None = None
        self._seated: list[Association] = []
        self._seating = threading.Lock()

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
        handlers: list[Any] = [
            (evt.EVT_REQUESTED, self._admit),
            (evt.EVT_CONN_OPEN, self._connected),
            (evt.EVT_REJECTED, self._rejected),
        ]
        for service in self._services:
            handlers.extend(service.handlers)
        server = self._server = Port(self._node, self._entity(), self.refusals, self._log, handlers)
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
        for one in server.active_associations:
            if not one.is_established and one.dul.socket and one.dul.socket.socket:
                server.shutdown_request(one.dul.socket.socket)  # it has not said who it is: there is nothing to abort
        established = [one for one in server.active_associations if one.is_established]
        aborts = [threading.Thread(target=one.abort, daemon=True) for one in established]
        for abort in aborts:
            abort.start()
        for abort in aborts:
            abort.join(GRACE)

    def _entity(self) -> AE:
        entity = AE(self._node.aet)
        entity.require_called_aet = True
        entity.require_calling_aet = list(self._node.allow_aet)
        entity.maximum_associations = 1 << 16  # counted by _admit: the library counts silent connections too
        entity.maximum_pdu_size = LARGEST_PDU
        entity.acse_timeout = self._node.artim
        entity.dimse_timeout = entity.network_timeout = self._node.idle
        entity.implementation_class_uid = IMPLEMENTATION_UID
        entity.implementation_version_name = IMPLEMENTATION_NAME
        entity.add_supported_context(Verification)
        for sop_class in SOP_CLASSES:
            entity.add_supported_context(sop_class, list(SYNTAXES))
        for service in self._services:
            entity.add_supported_context(service.sop_class, list(service.syntaxes))
        return entity

    def _connected(self, event: Event) -> None:
        Stream(event.assoc, self, self._node.stall).install()

    def _admit(self, event: Event) -> None:
        """Seat an association, or reject it as long as there is no seat or no room (PS3.8 9.3.4)."""
        association, peer = event.assoc, str(event.assoc.requestor.address)
        request = cast(A_ASSOCIATE, association.requestor.primitive)
        if request.application_context_name != DICOM:
            self.refusals.note(peer, "association 1/1/2", "another application context than DICOM's")
            association.acse.send_reject(*OTHER_APPLICATION)
            return association.kill()
        stores = any(context.abstract_syntax in SOP_CLASSES for context in request.presentation_context_definition_list)
        why, reason = self._full() if stores else None, CONGESTION
        with self._seating:
            self._seated = [one for one in self._seated if _sits(one)]
            neighbours = sum(one.requestor.address == peer for one in self._seated)
            if len(self._seated) >= self._node.max_associations:
                why, reason = f"{len(self._seated)} associations are open: node.max_associations", LOCAL_LIMIT
            elif neighbours >= self._node.max_per_peer:
                why, reason = f"{neighbours} associations are open from there: node.max_per_peer", LOCAL_LIMIT
            if not why:
                self._seated.append(association)
                return
        self.refusals.note(peer, f"association {TRANSIENT}/{PRESENTATION}/{reason}", why)
        association.acse.send_reject(TRANSIENT, PRESENTATION, reason)
        association.kill()

    def _rejected(self, event: Event) -> None:
        peer = event.assoc.requestor
        title = "called or calling AE title not allowed"
        self.refusals.note(str(peer.address), "association 1/1", f"{title}, calling {peer.ae_title!r}")

    # The desk of the streams (dicom/node/pdu_reader.py)

    def begin(self, command: Command, sop_class: str, syntax: str) -> Reception:
        return Reception(self._inbox, command, sop_class, syntax)

    def answered(self, association: Association, answer: Answer, size: int) -> None:
        peer = association.requestor
        if answer.path:
            self._log.info("received %s, %d bytes, from %r %s", answer.path.name, size, peer.ae_title, peer.address)
        else:
            self.refusals.note(str(peer.address), f"{answer.status:04X}", f"{answer.why}, from {peer.ae_title!r}")

    def lost(self, association: Association, size: int, why: str) -> None:
        peer = association.requestor
        self.refusals.note(str(peer.address), "unfinished", f"{why} after {size} bytes, from {peer.ae_title!r}")


def _sits(association: Association) -> bool:
    gone = association.is_released or association.is_aborted or association.is_rejected
    return association.is_alive() and not gone
