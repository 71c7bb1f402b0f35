"""DIMSE command sets: read a C-STORE request, write its response (PS3.7 6.3.1, 9.3.1; PS3.8 9.3.5).

Bytes in, bytes out, always Implicit VR Little Endian. Must not import sockets or data sets.
"""

import re
import struct
from dataclasses import dataclass

C_STORE_RQ, C_STORE_RSP = 0x0001, 0x8001  # Command Field (0000,0100)
NO_DATA_SET = 0x0101  # Command Data Set Type (0000,0800)
MAX_COMMAND = 1 << 16  # bytes of a command set; the longest real ones have a few hundred
P_DATA_TF = 0x04
IS_COMMAND, IS_LAST = 1, 2  # bits of a PDV's control header (PS3.8 E.2)
# Elements that each request needs (PS3.7 9.3, 10.3): message ID, class, instance, action, destination.
# For a C-STORE-RQ without class or instance, the response has a status instead.
MESSAGE_ID = 0x0110
_MESSAGE, _AFFECTED, _REQUESTED = (MESSAGE_ID,), (MESSAGE_ID, 0x0002), (MESSAGE_ID, 0x0003, 0x1001)
NEEDED = {
    C_STORE_RQ: _MESSAGE,
    0x0010: _AFFECTED,  # C-GET
    0x0020: _AFFECTED,  # C-FIND
    0x0021: (*_AFFECTED, 0x0600),  # C-MOVE
    0x0030: _AFFECTED,  # C-ECHO
    0x0100: (*_AFFECTED, 0x1000, 0x1002),  # N-EVENT-REPORT
    0x0110: _REQUESTED,  # N-GET
    0x0120: _REQUESTED,  # N-SET
    0x0130: (*_REQUESTED, 0x1008),  # N-ACTION
    0x0140: _AFFECTED,  # N-CREATE
    0x0150: _REQUESTED,  # N-DELETE
    0x0FFF: (0x0120,),  # C-CANCEL
}
RESPONSE = 0x8000  # bit of a Command Field


@dataclass(frozen=True)
class Command:
    """A C-STORE-RQ; for other commands only `field`, `has_data` and `missing` are valid."""

    field: int
    has_data: bool
    message_id: int | None
    sop_class: str
    sop_uid: str
    missing: str = ""  # why the command cannot be served; "" if it can


def parse(command: bytes | bytearray) -> Command:
    """Return a command from its encoded command set. Raises ValueError when that is malformed."""
    values: dict[int, bytes] = {}
    at, last = 0, -1
    while at < len(command):
        if at + 8 > len(command):
            raise ValueError("command set cut short")
        group, element, length = struct.unpack_from("<HHL", command, at)
        value = bytes(command[at + 8 : at + 8 + length])
        if group != 0 or element <= last or len(value) < length:
            raise ValueError("command set not readable")
        values[element], last = value, element
        at += 8 + length

    def number(element: int) -> int | None:
        value = values.get(element, b"")
        return struct.unpack("<H", value)[0] if len(value) == 2 else None

    def text(element: int) -> str:
        return values.get(element, b"").decode("latin-1").strip("\0 ")

    field, kind = number(0x0100), number(0x0800)
    if field is None or kind is None:
        raise ValueError("command set without command field or data set type")
    missing = _missing(field, values)
    return Command(field, kind != NO_DATA_SET, number(MESSAGE_ID), text(0x0002), text(0x1000), missing)


def _missing(field: int, values: dict[int, bytes]) -> str:
    if field & ~RESPONSE not in NEEDED:
        return f"no such command: {field:04X}"
    lengths = {element: len(values.get(element, b"")) for element in NEEDED.get(field, ())}
    absent = [element for element, n in lengths.items() if n == 0 or (element == MESSAGE_ID and n != 2)]
    return f"command {field:04X} without (0000,{absent[0]:04X})" if absent else ""


def store_response(command: Command, status: int, comment: str = "") -> bytes:
    """Return the C-STORE-RSP to `command` (PS3.7 table 9.3-2); `comment` is the reason, cut to 64 ASCII characters."""

    def element(number: int, value: bytes) -> bytes:
        return struct.pack("<HHL", 0, number, len(value)) + value

    def padded(text: str, padding: bytes) -> bytes:
        value = text.encode("latin-1", "replace")
        return value + padding * (len(value) % 2)

    body = element(0x0002, padded(command.sop_class, b"\0"))
    body += element(0x0100, struct.pack("<H", C_STORE_RSP))
    body += element(0x0120, struct.pack("<H", command.message_id or 0))
    body += element(0x0800, struct.pack("<H", NO_DATA_SET))
    body += element(0x0900, struct.pack("<H", status))
    if comment:
        plain = re.sub(r"[^ -\[\]-~]", "?", comment[:64])  # LO: no backslash, no control characters
        body += element(0x0902, padded(plain, b" "))
    body += element(0x1000, padded(command.sop_uid, b"\0"))
    return element(0, struct.pack("<L", len(body))) + body


def pdv(context: int, control: int, data: bytes) -> bytes:
    """Return one presentation data value item."""
    return struct.pack(">LBB", len(data) + 2, context, control) + data


def command_pdus(context: int, command: bytes, max_length: int) -> bytes:
    """Return the P-DATA-TF PDUs of a command for a peer with this maximum length; 0: unlimited (PS3.8 D.1)."""
    step = max(max_length - 6, 1) if max_length else len(command)
    cuts = range(0, len(command), step)
    return b"".join(
        p_data(pdv(context, IS_COMMAND | (IS_LAST if at == cuts[-1] else 0), command[at : at + step])) for at in cuts
    )


def p_data(items: bytes) -> bytes:
    """Return the P-DATA-TF PDU around presentation data value items."""
    return struct.pack(">BBL", P_DATA_TF, 0, len(items)) + items
