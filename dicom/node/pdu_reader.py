"""P-DATA from the socket: C-STORE data sets go straight to disk, everything else to pynetdicom as it came.

Stands in for two methods of pynetdicom 3.0.4, `DULServiceProvider._is_transport_event` and `_read_pdu_data`, and
naps for `DIMSEServiceProvider.get_msg`; tests/dicom/node/test_pdu_reader.py runs pynetdicom's own tests over them. The state
machine, association control and all other services stay the library's. Knows no inbox and no judgement of content.
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

from dicom.errors import AssociationEnded, ConnectionEnded, ProtocolError
from dicom.node import dimse_command as dimse
from dicom.node.associate_request import plain
from dicom.node.dimse_command import Command, pdv, store_response, whole
from dicom.node.reception import Answer
from dicom.node.socket_reader import INVALID, UNEXPECTED, UNRECOGNISED_PDU, Wire, log

LARGEST_PDU = 131072  # bytes; the most that dcmtk senders use, 8 times the default, and several times its speed
LARGEST_OTHER = 1 << 18  # bytes of an A-ASSOCIATE-RQ: 128 contexts of 45 syntaxes take 160 kB
MOST_PASSED = 8 << 20  # bytes of any other message; the library keeps those in memory
AWAKE = 1.0  # seconds in which the library polls at its own 1 kHz, after it was given something to do
SLOW = 0.25  # seconds between its polls otherwise

A_ASSOCIATE_RQ = 1  # PDU type
READY = "Sta6"  # association established (PS3.8 9.2.1)
WHOLE_COMMAND = dimse.IS_COMMAND | dimse.IS_LAST


class Sink(Protocol):
    """Where one object goes: `end` is asked after the last byte, `drop` when there will be none."""

    size: int

    def write(self, parts: list[memoryview]) -> None: ...
    def end(self) -> Answer: ...
    def drop(self) -> None: ...


class Desk(Protocol):
    """Who takes objects in, and hears what became of them."""

    def begin(self, command: Command, sop_class: str, syntax: str) -> Sink: ...
    def answered(self, association: Association, answer: Answer, size: int) -> None: ...
    def lost(self, association: Association, size: int, why: str) -> None: ...


class Stream:
    """What one association's peer says; `desk` None leaves C-STORE to the library too."""

    def __init__(self, association: Association, desk: Desk | None, stall: float = 30):
        self._association, self._dul, self._desk = association, association.dul, desk
        self._wire = Wire(association, stall)
        self._command = bytearray()  # as far as it came
        self._context = 0  # presentation context of the message
        self._open = False  # a data set is awaited or under way
        self._sink: Sink | None = None
        self._stored: Command | None = None  # the C-STORE-RQ that the sink belongs to
        self._passing = bytearray()  # presentation data values of this PDU that go to the library
        self._due: list[bytes] = []  # whole messages, or the beginning of one, that it gets one by one
        self._passed = 0  # bytes of this message that did
        self._handed_at = time.monotonic()  # when the library last got something to do
        self._deaf = False  # after our abort, what still comes is not looked at
        self._awake = threading.Event()
        self._awake.set()

    def install(self) -> None:
        """Put this stream in the place of the association's own reading; before its threads start."""
        dul, provider = self._dul, self._association.dimse
        self._library_wait, self._library_get = dul._is_transport_event, provider.get_msg
        dul._is_transport_event, dul._read_pdu_data, provider.get_msg = self.wait, self.read, self.get
        self._association.bind(evt.EVT_CONN_CLOSE, lambda event: self._wire.close())

    def get(self, block: bool = False) -> Any:
        """The next message for the association's own loop, which naps while there is nothing for it to do."""
        if not block:
            self._awake.wait(SLOW)
        return self._library_get(block)

    def wait(self) -> bool:
        """True when the library has an event to act on; C-STOREs that come meanwhile are dealt with here."""
        if self._dul.event_queue.empty() and self._pass_on():
            return True
        while self._undisturbed():
            self._awake.clear()
            if self._dul.to_provider_queue.queue or self._dul._kill_thread or not self._wire.readable():
                return False
            self._dul._read_pdu_data()
            if not self._undisturbed():
                return True
        if not self._dul.event_queue.empty():
            return False  # one event at a time: what comes next depends on the state it leads to
        if self._wire.pending:
            self._dul._read_pdu_data()
            return True
        return self._library_wait()

    def read(self) -> None:
        """Read one PDU for the library, or all those of a C-STORE."""
        try:
            if self._deaf:
                return self._wire.discard()
            if not self._open and not self._command:
                self._wire.begin()
            while not self._pdu() and self._sink:
                pass
        except ConnectionEnded:
            self._lose("connection closed")
            self._tell("Evt17")
        except AssociationEnded:
            self._lose("aborted by this node")
            self._handed_at = time.monotonic()
        except ProtocolError as fault:
            self._lose(str(fault), noted=True)
            self._abort(fault.reason)
        except Exception as fault:
            where = traceback.extract_tb(fault.__traceback__)[-1]
            self._lose(f"{type(fault).__name__} in {Path(where.filename).name}, line {where.lineno}")
            raise  # the library aborts; its message may hold values, ours does not
        return None

    def _pdu(self) -> bool:
        """Read one PDU; True when there was something for the library in it."""
        header = self._wire.take(6)
        kind, length = struct.unpack(">BxL", header)
        if not 1 <= kind <= 7:
            log.error("Unknown PDU type received '0x%02X'", kind)
            raise ProtocolError(UNRECOGNISED_PDU, "unrecognised PDU")
        if kind != dimse.P_DATA_TF or self._dul.state_machine.current_state != READY:
            if length > LARGEST_OTHER:
                raise ProtocolError(INVALID, f"PDU of {length} bytes")
            body = self._body(length)
            self._lose(f"PDU of type {kind} instead of the rest")
            self._hand_over(kind, body)
            return True
        if length > LARGEST_PDU:
            raise ProtocolError(INVALID, f"PDU of {length} bytes where {LARGEST_PDU} were negotiated")
        while length:
            size, context, control = struct.unpack(">LBB", self._wire.take(6)) if length >= 6 else (0, 0, 0)
            if size < 2 or size + 4 > length:
                raise ProtocolError(INVALID, f"presentation data value of {size} bytes")
            length -= size + 4
            self._value(context, control, size - 2)
        self._cut()
        return self._pass_on()

    def _cut(self) -> None:
        """A PDU of its own for what there is for the library: in one PDU it reads no further than one message."""
        if self._passing:
            self._due.append(bytes(self._passing))
            self._passing.clear()

    def _pass_on(self) -> bool:
        """Hand over the next of what is due, one event at a time; False when there is nothing."""
        if not self._due:
            return False
        self._hand_over(dimse.P_DATA_TF, self._due.pop(0))
        return True

    def _body(self, length: int) -> bytes:
        """The rest of a PDU for the library, whose words a cut one gets."""
        try:
            return self._wire.take(length)
        except ConnectionEnded:
            got, whole = 6 + self._wire.pending, 6 + length
            log.error("The received PDU is shorter than expected (%d of %d bytes received)", got, whole)
            raise

    def _value(self, context: int, control: int, size: int) -> None:
        """One presentation data value: a piece of a command, of an object, or of what the library gets."""
        is_command, is_last = bool(control & dimse.IS_COMMAND), bool(control & dimse.IS_LAST)
        if is_command == self._open or (context != self._context and (self._open or self._command)):
            raise ProtocolError(UNEXPECTED, "presentation data value out of turn")
        if is_command:
            if len(self._command) + size > dimse.MOST:
                raise ProtocolError(INVALID, f"command of more than {dimse.MOST} bytes")
            self._context = context
            self._command += self._wire.take(size)
            if is_last:
                self._commanded()
        elif self._sink:
            self._wire.pour(size, self._sink.write)
            if is_last:
                self._answer(self._sink)
        else:
            self._passed += size
            if self._passed > MOST_PASSED:
                raise ProtocolError(INVALID, f"message of more than {MOST_PASSED} bytes")
            self._passing += pdv(context, control, self._wire.take(size))
            self._open = not is_last
            if is_last:
                self._cut()

    def _commanded(self) -> None:
        """A command is complete: a C-STORE opens a sink, any other goes to the library."""
        raw, self._command = bytes(self._command), bytearray()
        try:
            command = dimse.parse(raw)
        except ValueError as error:
            raise ProtocolError(INVALID, str(error)) from None
        if self._desk is not None and command.missing:
            raise ProtocolError(INVALID, command.missing)
        if self._desk is None or command.field != dimse.C_STORE_RQ:
            self._open, self._passed = command.has_data, 0
            self._passing += pdv(self._context, WHOLE_COMMAND, raw)
            return None if self._open else self._cut()
        found = [one for one in self._association.accepted_contexts if one.context_id == self._context]
        if not found:
            raise ProtocolError(INVALID, "C-STORE in no accepted presentation context")
        self._awake.clear()
        self._open, self._stored = command.has_data, command
        self._sink = self._desk.begin(command, str(found[0].abstract_syntax), str(found[0].transfer_syntax[0]))
        return None if command.has_data else self._answer(self._sink)

    def _answer(self, sink: Sink) -> None:
        """The object is whole: what the sink says of it goes to the peer."""
        assert self._desk is not None
        assert self._stored is not None
        self._wire.flush()
        answer, size = sink.end(), sink.size
        self._sink, self._open = None, False
        response = store_response(self._stored, answer.status, answer.why)
        self._handed_at = -AWAKE  # back to undisturbed at once
        try:
            self._wire.send(whole(self._context, response, self._association.dimse.maximum_pdu_size or 0))
        finally:
            self._desk.answered(self._association, answer, size)

    def _lose(self, why: str, noted: bool = False) -> None:
        """Drop the message that was on its way; the desk hears of an object, and with `noted` of anything else too."""
        self._wire.drop()
        sink, self._sink, self._open = self._sink, None, False
        self._command.clear()
        self._passing.clear()
        self._due.clear()
        if sink:
            sink.drop()
        if self._desk and (sink or noted):
            self._desk.lost(self._association, sink.size if sink else 0, why)

    # What the library is told

    def _undisturbed(self) -> bool:
        """True while an established association has nothing for the library to do."""
        quiet = time.monotonic() - self._handed_at > AWAKE
        return quiet and not self._deaf and self._dul.state_machine.current_state == READY

    def _hand_over(self, kind: int, body: bytes) -> None:
        """One whole PDU to the library's state machine."""
        try:
            body = plain(body) if kind == A_ASSOCIATE_RQ else body
            pdu, event = self._dul._decode_pdu(bytearray(struct.pack(">BxL", kind, len(body)) + body))
            _understood(pdu)
        except Exception:  # noqa: BLE001
            log.exception("Unable to decode the received PDU data")  # its decoders raise what they like
            self._lose(f"PDU of type {kind} that can't be read", noted=True)
            return self._tell("Evt19")
        self._dul._recv_pdu.put(pdu)
        return self._tell(event)

    def _tell(self, event: str) -> None:
        self._handed_at = time.monotonic()
        self._dul.event_queue.put(event)
        self._awake.set()

    def _abort(self, reason: int) -> None:
        self._deaf = True
        if reason == UNRECOGNISED_PDU or self._dul.state_machine.current_state != READY:
            return self._tell("Evt19")  # which the state machine knows; it says "no reason" to the peer
        primitive = A_P_ABORT()
        primitive.provider_reason = reason
        self._dul.to_provider_queue.put(primitive)  # to the peer, by action AA-1
        self._dul.to_user_queue.put(primitive)  # to the association
        self._handed_at = time.monotonic()
        return self._awake.set()


def _understood(pdu: Any) -> None:
    """Raise what the library would raise later, in a thread that would die of it and leave the connection open."""
    primitive = pdu.to_primitive()
    for context in getattr(primitive, "presentation_context_definition_list", ()):
        if not context.transfer_syntax:
            raise ValueError(f"presentation context {context.context_id} without a transfer syntax")
