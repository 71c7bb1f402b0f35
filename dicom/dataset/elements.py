"""The elements of a data set found by seeks alone: where the pixels are, and the few values that say whose they are.

Holds no value that nobody asked for, follows sequences of any depth without recursion, and gives up at a bound: a
listener walks through what strangers send. Knows no dictionary and no meaning.
"""

import os
import struct
from dataclasses import dataclass, field
from typing import BinaryIO

from pydicom.dataelem import DataElement, RawDataElement
from pydicom.tag import BaseTag
from pydicom.valuerep import EXPLICIT_VR_LENGTH_16, EXPLICIT_VR_LENGTH_32

from dicom.errors import Unreadable

UNDEFINED = 0xFFFFFFFF
PIXEL_DATA = 0x7FE00010
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
LONG_VRS = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
VRS = frozenset(vr.encode() for vr in (*EXPLICIT_VR_LENGTH_16, *EXPLICIT_VR_LENGTH_32))
MOST = 1 << 18  # elements and items of one data set: images have hundreds, and each costs microseconds
LONGEST = 1 << 10  # bytes of a value that is kept: an identifier, a UID


@dataclass
class Walk:
    """What one way through a data set found; `pixel_length` is None without pixels, UNDEFINED encapsulated."""

    pixel_length: int | None = None
    pixel_vr: str = ""
    pixel_offset: int = 0  # of the first byte of the value
    kept: dict[BaseTag, DataElement | RawDataElement] = field(default_factory=dict)


def walk(stream: BinaryIO, implicit: bool, little: bool, end: int, wanted: frozenset[int] = frozenset()) -> Walk:
    """Go from the stream's position to the pixels, or to `end`. Raises Unreadable at whatever is cut short.

    Values of `wanted` tags at the top level are kept. A sequence of undefined length is followed item by item (PS3.5
    7.5.2), pixels of undefined length fragment by fragment (A.4).
    """
    found, order = Walk(pixel_offset=end), struct.Struct(("<" if little else ">") + "HH2sH")
    opened: list[int] = []  # what will end each open sequence and item, the innermost last
    unknown = 0  # how many are open with the outermost sequence of VR UN; 0: none
    for _ in range(MOST):
        element = _next(stream, implicit, order, unknown > 0)
        if element is None or (not opened and element[0] > PIXEL_DATA):
            break
        tag, vr, length = element
        offset = stream.tell()
        if opened and tag == opened[-1]:
            opened.pop()
            unknown = unknown if len(opened) >= unknown else 0
            if not opened and found.pixel_length:
                return found
            continue
        if opened and opened[-1] == SEQUENCE_END and tag != ITEM:
            raise Unreadable(f"{_place(found)} of undefined length does not hold items")
        is_pixels = tag == PIXEL_DATA and not opened
        if is_pixels:
            found.pixel_length, found.pixel_vr, found.pixel_offset = length, "OW" if implicit else vr, offset
        if length == UNDEFINED and (tag != ITEM or not found.pixel_length):
            opened.append(ITEM_END if tag == ITEM else SEQUENCE_END)
            unknown = unknown or (len(opened) if vr == "UN" else 0)
            continue
        if offset + length > end:
            raise Unreadable(f"{_place(found)} is cut short: {end - offset} of {length} bytes")
        if is_pixels:
            return found
        if tag in wanted and not opened and length <= LONGEST:
            value = stream.read(length)
            found.kept[BaseTag(tag)] = RawDataElement(BaseTag(tag), vr or None, length, value, offset, implicit, little)
        else:
            stream.seek(length, os.SEEK_CUR)
    else:
        raise Unreadable(f"data set of more than {MOST} elements")
    if opened:
        raise Unreadable(f"{_place(found)} is cut short: no sequence delimiter")
    return found


def _place(found: Walk) -> str:
    return "data set" if found.pixel_length is None else "PixelData (7FE0,0010)"


def _next(stream: BinaryIO, implicit: bool, order: struct.Struct, in_un: bool) -> tuple[int, str, int] | None:
    """(tag, VR, length) of the element that begins here, its VR "" where none is written; None at the end.

    Within explicit data sets items are implicit, and what a UN sequence holds (PS3.5 6.2.2), though some devices write
    VRs there: they are believed where they name one, since the letters may as well be a length.
    """
    start = stream.read(8)
    if not start:
        return None
    if len(start) < 8:
        raise Unreadable("data set cut short within a tag")
    group, number, vr, length = order.unpack(start)
    written = vr in VRS if in_un else b"AA" <= vr <= b"ZZ"
    if implicit or group == 0xFFFE or not written:
        return group << 16 | number, "", struct.unpack(order.format[0] + "L", start[4:])[0]
    if vr in LONG_VRS:
        more = stream.read(4)
        if len(more) < 4:
            raise Unreadable("data set cut short within a tag")
        length = struct.unpack(order.format[0] + "L", more)[0]
    return group << 16 | number, vr.decode("latin-1"), length
