"""Removes from an A-ASSOCIATE-RQ what a receiver must ignore (PS3.8 9.3.1, 9.3.2) and pynetdicom cannot read.

Bytes in, bytes out; negotiates nothing.
"""

import struct
from collections.abc import Iterator

APPLICATION_CONTEXT, PRESENTATION_CONTEXT, USER_INFORMATION = 0x10, 0x20, 0x50
SUB_ITEMS = range(0x51, 0x5A)  # of the user information: PS3.8 D and PS3.7 D.3
MAX_LENGTH, ROLE, VERSION_NAME, USER_IDENTITY = 0x51, 0x54, 0x55, 0x58
SMALLEST = 7  # bytes of a PDU that contains one byte of a message (PS3.8 9.3.5)
FIXED = 68  # bytes before the first item: version, titles, reserved


def clean(body: bytes) -> bytes:
    """Return the body of an A-ASSOCIATE-RQ without items that the standard does not define.

    Reduces the protocol version to bit 0, and pads titles with blanks instead of NUL. Adds the item for an unlimited
    maximum length where that item is absent (PS3.8 D.1). Raises ValueError when the body is cut short.
    """
    if len(body) < FIXED:
        raise ValueError("A-ASSOCIATE-RQ cut short")
    version = b"\0\1" if body[1] & 1 else body[:2]
    cleaned = version + body[2:4] + body[4:36].replace(b"\0", b" ") + body[36:FIXED]
    for kind, value in _items(body[FIXED:]):
        if kind == USER_INFORMATION:
            subs = [sub for sub in _items(value) if _is_valid(*sub)]
            if all(sub[0] != MAX_LENGTH for sub in subs):
                subs.insert(0, (MAX_LENGTH, bytes(4)))
            cleaned += _item(kind, b"".join(_item(*sub) for sub in subs))
        elif kind in (APPLICATION_CONTEXT, PRESENTATION_CONTEXT):
            cleaned += _item(kind, value)
    return cleaned


def _is_valid(kind: int, value: bytes) -> bool:
    """Return False for a sub-item to remove: of a later edition, or with an invalid value.

    Raises ValueError for a maximum length that is too short for any answer.
    """
    if kind == MAX_LENGTH and 0 < int.from_bytes(value) < SMALLEST:
        raise ValueError(f"A-ASSOCIATE-RQ of a peer with a maximum length of {int.from_bytes(value)} bytes")
    if kind == ROLE:
        return set(value[-2:]) <= {0, 1}
    if kind == VERSION_NAME:  # at most 16 characters (PS3.7 D.3.3.2.3)
        return 0 < len(value) <= 16 and value.isascii() and value.decode().isprintable()
    if kind == USER_IDENTITY:  # never answered; only the types that the library can read
        return value[:1] in (b"\1", b"\2", b"\3", b"\4", b"\5")
    return kind in SUB_ITEMS


def _items(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        kind, length = struct.unpack(">BxH", data[at : at + 4].ljust(4, b"\0"))
        value = data[at + 4 : at + 4 + length]
        if at + 4 + length > len(data):
            raise ValueError(f"A-ASSOCIATE-RQ with an item of type {kind:02X} cut short")
        yield kind, value
        at += 4 + length


def _item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(value)) + value
