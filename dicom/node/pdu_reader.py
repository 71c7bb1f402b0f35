"""Reads PDUs from the socket: C-STORE data sets go directly to disk, everything else goes to pynetdicom unchanged.

Replaces two methods of pynetdicom 3.0.4, `DULServiceProvider._is_transport_event` and `_read_pdu_data`, and makes
`DIMSEServiceProvider.get_msg` poll less often; tests/dicom/node/test_pdu_reader.py runs pynetdicom's own tests over
them. State machine, association control and all other services remain pynetdicom's. Must not import the inbox.
"""

import struct
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Protocol

from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import A_P_ABORT

from dicom.dataset.part10 import HOSTILE
from dicom.errors import AssociationEnded, ConnectionEnded, ProtocolError
from dicom.node import dimse_command as dimse
from dicom.node.associate_request import clean
from dicom.node.dimse_command import Command, command_pdus, pdv, store_response
from dicom.node.reception import Response
from dicom.node.socket_reader import INVALID, UNEXPECTED, UNRECOGNISED_PDU, SocketReader, log

LARGEST_PDU = 131072  # bytes; the largest that dcmtk senders use, and several times faster than the default of 16384
LARGEST_OTHER = 1 << 18  # bytes of an A-ASSOCIATE-RQ: 128 contexts of 45 syntaxes take 160 kB
MAX_MESSAGE = 8 << 20  # bytes of any other message; the library keeps those in memory
AWAKE = 1.0  # seconds after an event in which the library polls at its own 1 kHz
SLOW = 0.25  # seconds between its polls at other times

A_ASSOCIATE_RQ = 1  # PDU type
READY = "Sta6"  # association established (PS3.8 9.2.1)
WHOLE_COMMAND = dimse.IS_COMMAND | dimse.IS_LAST


class Sink(Protocol):
    """Receives one object: `finish` is called after the last byte, `drop` when the object is incomplete."""

    size: int

    def write(self, parts: list[memoryview]) -> None: ...
    def finish(self) -> Response: ...
    def drop(self) -> None: ...


class StorageHandler(Protocol):
    """Starts a sink for each C-STORE, and is called with the result."""

    def begin(self, command: Command, sop_class: str, syntax: str) -> Sink: ...
    def completed(self, association: Association, response: Response, size: int) -> None: ...
    def interrupted(self, association: Association, size: int, why: str) -> None: ...


class PduReader:
    """Reads the PDUs of one association; with `storage` None, C-STORE goes to the library too."""

    def __init__(self, association: Association, storage: StorageHandler | None, stall: float = 30):
        self._association, self._dul, self._storage = association, association.dul, storage
        self._wire = SocketReader(association, stall)
        self._command = bytearray()  # the part received so far
        self._context = 0  # presentation context of the message
        self._expects_data = False  # the command has a data set that is not complete yet
        self._sink: Sink | None = None
        self._request: Command | None = None  # the C-STORE-RQ that the sink belongs to
        self._values = bytearray()  # presentation data values of this PDU for the library
        self._queue: list[bytes] = []  # bodies of P-DATA-TF PDUs for the library, passed on one by one
        self._size = 0  # bytes of this message for the library
        self._event_at = time.monotonic()  # time of the library's last event
        self._aborted = False  # we aborted: discard all further bytes
        self._awake = threading.Event()
        self._awake.set()

    def install(self) -> None:
        """Replace the association's own reading methods; call before its threads start."""
        dul, provider = self._dul, self._association.dimse
        self._library_wait, self._library_get = dul._is_transport_event, provider.get_msg
        dul._is_transport_event, dul._read_pdu_data, provider.get_msg = self.wait, self.read, self.get
        self._association.bind(evt.EVT_CONN_CLOSE, lambda event: self._wire.close())

    def get(self, block: bool = False) -> Any:
        """Return the next message for the association's own loop, which sleeps here while nothing happens."""
        if not block:
            self._awake.wait(SLOW)
        return self._library_get(block)

    def wait(self) -> bool:
        """Return True when the library has an event to process; C-STOREs that arrive meanwhile are handled here."""
        if self._dul.event_queue.empty() and self._pass_queued():
            return True
        while self._library_idle():
            self._awake.clear()
            if self._dul.to_provider_queue.queue or self._dul._kill_thread or not self._wire.readable():
                return False
            self._dul._read_pdu_data()
            if not self._library_idle():
                return True
        if not self._dul.event_queue.empty():
            return False  # one event at a time: each may change the state
        if self._wire.pending:
            self._dul._read_pdu_data()
            return True
        return self._library_wait()

    def read(self) -> None:
        """Read one PDU for the library, or all PDUs of a C-STORE."""
        try:
            if self._aborted:
                return self._wire.discard()
            if not self._expects_data and not self._command:
                self._wire.start_message()
            while not self._read_pdu() and self._sink:
                pass
        except ConnectionEnded:
            self._drop_message("connection closed")
            self._post_event("Evt17")
        except AssociationEnded:
            self._drop_message("aborted by this node")
            self._event_at = time.monotonic()
        except ProtocolError as error:
            self._drop_message(str(error), count=True)
            self._abort(error.reason)
        except Exception as error:  # a bug of ours: count it without values of the message, then raise it
            place = traceback.extract_tb(error.__traceback__)[-1]
            self._drop_message(f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}")
            raise  # the library logs it, silenced in service, and aborts the association
        return None

    def _read_pdu(self) -> bool:
        """Read one PDU; return True when it contained something for the library."""
        header = self._wire.read(6)
        kind, length = struct.unpack(">BxL", header)
        if not 1 <= kind <= 7:
            log.error("Unknown PDU type received '0x%02X'", kind)
            raise ProtocolError(UNRECOGNISED_PDU, "unrecognised PDU")
        if kind != dimse.P_DATA_TF or self._dul.state_machine.current_state != READY:
            if length > LARGEST_OTHER:
                raise ProtocolError(INVALID, f"PDU of {length} bytes")
            body = self._body(length)
            self._drop_message(f"PDU of type {kind} instead of the rest")
            self._pass_pdu(kind, body)
            return True
        if length > LARGEST_PDU:
            raise ProtocolError(INVALID, f"PDU of {length} bytes where {LARGEST_PDU} were negotiated")
        while length:
            size, context, control = struct.unpack(">LBB", self._wire.read(6)) if length >= 6 else (0, 0, 0)
            if size < 2 or size + 4 > length:
                raise ProtocolError(INVALID, f"presentation data value of {size} bytes")
            length -= size + 4
            self._read_value(context, control, size - 2)
        self._enqueue()
        return self._pass_queued()

    def _enqueue(self) -> None:
        """Queue the values for the library as one PDU: of each PDU the library reads only one message."""
        if self._values:
            self._queue.append(bytes(self._values))
            self._values.clear()

    def _pass_queued(self) -> bool:
        """Pass the next queued PDU to the library, one at a time; return False when there is none."""
        if not self._queue:
            return False
        self._pass_pdu(dimse.P_DATA_TF, self._queue.pop(0))
        return True

    def _body(self, length: int) -> bytes:
        """Return the rest of a PDU for the library; logs a short PDU in the library's words."""
        try:
            return self._wire.read(length)
        except ConnectionEnded:
            received, expected = 6 + self._wire.pending, 6 + length
            log.error("The received PDU is shorter than expected (%d of %d bytes received)", received, expected)
            raise

    def _read_value(self, context: int, control: int, size: int) -> None:
        """Read one presentation data value: a part of a command, of an object, or of a message for the library."""
        is_command, is_last = bool(control & dimse.IS_COMMAND), bool(control & dimse.IS_LAST)
        if is_command == self._expects_data or (context != self._context and (self._expects_data or self._command)):
            raise ProtocolError(UNEXPECTED, "presentation data value out of turn")
        if is_command:
            if len(self._command) + size > dimse.MAX_COMMAND:
                raise ProtocolError(INVALID, f"command of more than {dimse.MAX_COMMAND} bytes")
            self._context = context
            self._command += self._wire.read(size)
            if is_last:
                self._command_complete()
        elif self._sink:
            self._wire.forward(size, self._sink.write)
            if is_last:
                self._object_complete(self._sink)
        else:
            self._size += size
            if self._size > MAX_MESSAGE:
                raise ProtocolError(INVALID, f"message of more than {MAX_MESSAGE} bytes")
            self._values += pdv(context, control, self._wire.read(size))
            self._expects_data = not is_last
            if is_last:
                self._enqueue()

    def _command_complete(self) -> None:
        """Start a sink for a C-STORE; pass any other command to the library."""
        raw, self._command = bytes(self._command), bytearray()
        try:
            command = dimse.parse(raw)
        except ValueError as error:
            raise ProtocolError(INVALID, str(error)) from None
        if self._storage is not None and command.missing:
            raise ProtocolError(INVALID, command.missing)
        if self._storage is None or command.field != dimse.C_STORE_RQ:
            self._expects_data, self._size = command.has_data, 0
            self._values += pdv(self._context, WHOLE_COMMAND, raw)
            return None if self._expects_data else self._enqueue()
        contexts = [each for each in self._association.accepted_contexts if each.context_id == self._context]
        if not contexts:
            raise ProtocolError(INVALID, "C-STORE in no accepted presentation context")
        self._awake.clear()
        self._expects_data, self._request = command.has_data, command
        sop_class, syntax = str(contexts[0].abstract_syntax), str(contexts[0].transfer_syntax[0])
        self._sink = self._storage.begin(command, sop_class, syntax)
        return None if command.has_data else self._object_complete(self._sink)

    def _object_complete(self, sink: Sink) -> None:
        """Finish the object and send its status to the peer."""
        assert self._storage is not None
        assert self._request is not None
        self._wire.flush()
        response, size = sink.finish(), sink.size
        self._sink, self._expects_data = None, False
        encoded = store_response(self._request, response.status, response.why)
        self._event_at = -AWAKE  # the library stays idle
        try:
            self._wire.send(command_pdus(self._context, encoded, self._association.dimse.maximum_pdu_size or 0))
        finally:
            self._storage.completed(self._association, response, size)

    def _drop_message(self, why: str, count: bool = False) -> None:
        """Drop the incomplete message; report it to the storage handler if it is an object, or if `count` is set."""
        self._wire.drop()
        sink, self._sink, self._expects_data = self._sink, None, False
        self._command.clear()
        self._values.clear()
        self._queue.clear()
        if sink:
            sink.drop()
        if self._storage and (sink or count):
            self._storage.interrupted(self._association, sink.size if sink else 0, why)

    # Events for the library

    def _library_idle(self) -> bool:
        """Return True while the association is established and the library has nothing to do."""
        quiet = time.monotonic() - self._event_at > AWAKE
        return quiet and not self._aborted and self._dul.state_machine.current_state == READY

    def _pass_pdu(self, kind: int, body: bytes) -> None:
        """Pass one complete PDU to the library's state machine."""
        try:
            body = clean(body) if kind == A_ASSOCIATE_RQ else body
            pdu, event = self._dul._decode_pdu(bytearray(struct.pack(">BxL", kind, len(body)) + body))
            _check_primitive(pdu)
        except HOSTILE:
            log.exception("Unable to decode the received PDU data")
            self._drop_message(f"PDU of type {kind} that cannot be decoded", count=True)
            return self._post_event("Evt19")
        self._dul._recv_pdu.put(pdu)
        return self._post_event(event)

    def _post_event(self, event: str) -> None:
        self._event_at = time.monotonic()
        self._dul.event_queue.put(event)
        self._awake.set()

    def _abort(self, reason: int) -> None:
        self._aborted = True
        if reason == UNRECOGNISED_PDU or self._dul.state_machine.current_state != READY:
            return self._post_event("Evt19")  # the state machine aborts, with "no reason"
        primitive = A_P_ABORT()
        primitive.provider_reason = reason
        self._dul.to_provider_queue.put(primitive)  # to the peer, by action AA-1
        self._dul.to_user_queue.put(primitive)  # to the association
        self._event_at = time.monotonic()
        return self._awake.set()


def _check_primitive(pdu: Any) -> None:
    """Raise now what the library would raise later in another thread, which would end and leave the connection open."""
    primitive = pdu.to_primitive()
    for context in getattr(primitive, "presentation_context_definition_list", ()):
        if not context.transfer_syntax:
            raise ValueError(f"presentation context {context.context_id} without a transfer syntax")
