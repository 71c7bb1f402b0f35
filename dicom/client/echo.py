"""C-ECHO over a plain or TLS socket, written and read byte by byte (PS3.7 9.1.5, PS3.8 9.3).

`status` and the supervisor use it to ask whether a node is ready. Must not import pydicom or pynetdicom: loading them
takes longer than the question.
"""

import contextlib
import socket
import ssl
import struct
import time

VERIFICATION = b"1.2.840.10008.1.1"
APPLICATION_CONTEXT = b"1.2.840.10008.3.1.1.1"
IMPLICIT_LE = b"1.2.840.10008.1.2"
IMPLEMENTATION = b"1.2.826.0.1.3680043.8.498.7427.1"
ASSOCIATE_RQ, ASSOCIATE_AC, ASSOCIATE_RJ, P_DATA, RELEASE_RQ, RELEASE_RP = 1, 2, 3, 4, 5, 6  # PDU types, PS3.8 9.3.1
PRESENTATION_CONTEXT_AC, ACCEPTANCE = 0x21, 0  # PS3.8 table 9-18
REJECTED_TRANSIENT = 2  # PS3.8 table 9-21: "try again later"
CONTEXT, MESSAGE = 1, 1  # our presentation context ID and message ID
COMMAND, LAST = 1, 2  # bits of a PDV's control header, PS3.8 E.2
C_ECHO_RQ, C_ECHO_RSP, NO_DATA_SET = 0x0030, 0x8030, 0x0101
COMMAND_FIELD, RESPONDED_TO, STATUS = 0x0100, 0x0120, 0x0900  # elements of group 0000
LONGEST = 1 << 16  # bytes of a PDU or a command; real answers have a few hundred
PATIENCE_S = 10.0  # for the whole exchange


def is_running(
    host: str,
    port: int,
    called_aet: str,
    calling_aet: str,
    tls: ssl.SSLContext | None = None,
    patience: float = PATIENCE_S,
) -> bool:
    """Return True when the node answers C-ECHO with Success, or rejects the association for now because it is busy.

    Returns False when nothing listens, the node rejects the association for good, answers nothing within `patience`
    seconds, or answers no DICOM.
    """
    deadline = time.monotonic() + patience
    try:
        with contextlib.ExitStack() as stack:
            wire = stack.enter_context(socket.create_connection((host, port), patience))
            if tls:
                wire = stack.enter_context(tls.wrap_socket(wire, server_hostname=host))
            wire.sendall(association_request(called_aet, calling_aet))
            kind, body = _pdu(wire, deadline)
            if kind == ASSOCIATE_RJ:
                return len(body) == 4 and body[1] == REJECTED_TRANSIENT
            if kind != ASSOCIATE_AC or not _accepted(body):
                return False
            wire.sendall(echo_request())
            success = _status(_command(wire, deadline)) == 0
            _release(wire, deadline)
            return success
    except (OSError, ValueError):  # ssl.SSLError and TimeoutError are OSErrors
        return False


def association_request(called_aet: str, calling_aet: str) -> bytes:
    """Return an A-ASSOCIATE-RQ PDU (PS3.8 9.3.2) that proposes Verification in Implicit VR Little Endian."""
    context = struct.pack(">BxBx", CONTEXT, 0) + _item(0x30, VERIFICATION) + _item(0x40, IMPLICIT_LE)
    user = _item(0x51, struct.pack(">L", LONGEST)) + _item(0x52, IMPLEMENTATION)
    titles = b"".join(title.encode("ascii", "replace").ljust(16)[:16] for title in (called_aet, calling_aet))
    body = struct.pack(">Hxx", 1) + titles + bytes(32)
    return _framed(ASSOCIATE_RQ, body + _item(0x10, APPLICATION_CONTEXT) + _item(0x20, context) + _item(0x50, user))


def echo_request() -> bytes:
    """Return a P-DATA-TF PDU with one C-ECHO-RQ (PS3.7 table 9.3-12)."""
    elements = (
        (0x0002, VERIFICATION + b"\0"),  # UIDs have an even length
        (COMMAND_FIELD, struct.pack("<H", C_ECHO_RQ)),
        (0x0110, struct.pack("<H", MESSAGE)),
        (0x0800, struct.pack("<H", NO_DATA_SET)),
    )
    command = b"".join(struct.pack("<HHL", 0, number, len(value)) + value for number, value in elements)
    command = struct.pack("<HHLL", 0, 0, 4, len(command)) + command
    value = struct.pack(">BB", CONTEXT, COMMAND | LAST) + command
    return _framed(P_DATA, struct.pack(">L", len(value)) + value)


def _item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(value)) + value


def _framed(kind: int, body: bytes) -> bytes:
    return struct.pack(">BxL", kind, len(body)) + body


def _pdu(wire: socket.socket, deadline: float) -> tuple[int, bytes]:
    """Return type and body of the next PDU; raises ValueError, or TimeoutError after the deadline."""
    kind, length = struct.unpack(">BxL", _exactly(wire, 6, deadline))
    if not ASSOCIATE_RQ <= kind <= 7 or length > LONGEST:
        raise ValueError(f"PDU type {kind}, {length} bytes")
    return kind, _exactly(wire, length, deadline)


def _exactly(wire: socket.socket, length: int, deadline: float) -> bytes:
    received = bytearray()
    while len(received) < length:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        wire.settimeout(left)
        part = wire.recv(length - len(received))
        if not part:
            raise ValueError("the peer closed the connection")
        received += part
    return bytes(received)


def _accepted(body: bytes) -> bool:
    """Return True when an A-ASSOCIATE-AC (PS3.8 9.3.3) accepts our presentation context."""
    at = 68  # protocol version, titles and reserved bytes
    while at + 4 <= len(body):
        kind, length = struct.unpack_from(">BxH", body, at)
        item = body[at + 4 : at + 4 + length]
        if kind == PRESENTATION_CONTEXT_AC and len(item) >= 4 and item[0] == CONTEXT:
            return item[2] == ACCEPTANCE
        at += 4 + length
    return False


def _command(wire: socket.socket, deadline: float) -> bytes:
    """Return the command set of the next message, put together from its fragments."""
    command = bytearray()
    while True:
        kind, body = _pdu(wire, deadline)
        if kind != P_DATA:
            raise ValueError(f"PDU type {kind} where P-DATA-TF was due")
        at = 0
        while at + 6 <= len(body):
            length, context, control = struct.unpack_from(">LBB", body, at)
            if length < 2 or context != CONTEXT or not control & COMMAND:
                raise ValueError("a fragment of something other than our command")
            command += body[at + 6 : at + 4 + length]
            if control & LAST:
                return bytes(command)
            at += 4 + length
        if len(command) > LONGEST:
            raise ValueError("a command without an end")


def _status(command: bytes) -> int:
    """Return the status of a C-ECHO-RSP to our message; raises ValueError for any other command."""
    numbers: dict[int, int] = {}
    at = 0
    while at + 8 <= len(command):
        group, element, length = struct.unpack_from("<HHL", command, at)
        if group == 0 and length == 2 and at + 10 <= len(command):
            numbers[element] = struct.unpack_from("<H", command, at + 8)[0]
        at += 8 + length
    if (numbers.get(COMMAND_FIELD), numbers.get(RESPONDED_TO)) != (C_ECHO_RSP, MESSAGE) or STATUS not in numbers:
        raise ValueError("no C-ECHO-RSP to our request")
    return numbers[STATUS]


def _release(wire: socket.socket, deadline: float) -> None:
    """Release the association; a peer that does not answer keeps what it answered before."""
    with contextlib.suppress(OSError, ValueError):
        wire.sendall(_framed(RELEASE_RQ, bytes(4)))
        _pdu(wire, min(deadline, time.monotonic() + 1))
