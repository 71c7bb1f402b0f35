"""Find the pixels of a data set, and a few wanted values, by seeking from element to element.

Keeps only the wanted values, follows sequences of any depth without recursion, and stops at a limit, because the data
set may come from any sender. Uses no data dictionary.
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
MAX_ELEMENTS = 1 << 18  # elements and items of one data set: images have hundreds, and each costs microseconds
MAX_VALUE = 1 << 10  # bytes of a value that is kept: an identifier, a UID


@dataclass
class Walk:
    """The result of `walk`; `pixel_length` is None without pixels, and UNDEFINED for encapsulated pixels."""

    pixel_length: int | None = None
    pixel_vr: str = ""
    pixel_offset: int = 0  # of the first byte of the value
    kept: dict[BaseTag, DataElement | RawDataElement] = field(default_factory=dict)


def walk(stream: BinaryIO, implicit: bool, little: bool, end: int, wanted: frozenset[int] = frozenset()) -> Walk:
    """Go from the stream's position to the pixels, or to `end`. Raises Unreadable where an element is cut short.

    Keeps values of `wanted` tags at the top level. Follows a sequence of undefined length item by item (PS3.5 7.5.2),
    and pixels of undefined length fragment by fragment (A.4).
    """
    result, order = Walk(pixel_offset=end), struct.Struct(("<" if little else ">") + "HH2sH")
    delimiters: list[int] = []  # the delimiter of each open sequence and item, the innermost last
    unknown = 0  # depth of the outermost open sequence of VR UN; 0: none is open
    for _ in range(MAX_ELEMENTS):
        element = _next(stream, implicit, order, unknown > 0)
        if element is None or (not delimiters and element[0] > PIXEL_DATA):
            break
        tag, vr, length = element
        offset = stream.tell()
        if delimiters and tag == delimiters[-1]:
            delimiters.pop()
            unknown = unknown if len(delimiters) >= unknown else 0
            if not delimiters and result.pixel_length:
                return result
            continue
        if delimiters and delimiters[-1] == SEQUENCE_END and tag != ITEM:
            raise Unreadable(f"{_place(result)} of undefined length does not hold items")
        is_pixels = tag == PIXEL_DATA and not delimiters
        if is_pixels:
            result.pixel_length, result.pixel_vr, result.pixel_offset = length, "OW" if implicit else vr, offset
        if length == UNDEFINED and (tag != ITEM or not result.pixel_length):
            delimiters.append(ITEM_END if tag == ITEM else SEQUENCE_END)
            unknown = unknown or (len(delimiters) if vr == "UN" else 0)
            continue
        if offset + length > end:
            raise Unreadable(f"{_place(result)} is cut short: {end - offset} of {length} bytes")
        if is_pixels:
            return result
        if tag in wanted and not delimiters and length <= MAX_VALUE:
            value, key = stream.read(length), BaseTag(tag)
            result.kept[key] = RawDataElement(key, vr or None, length, value, offset, implicit, little)
        else:
            stream.seek(length, os.SEEK_CUR)
    else:
        raise Unreadable(f"data set of more than {MAX_ELEMENTS} elements")
    if delimiters:
        raise Unreadable(f"{_place(result)} is cut short: no sequence delimiter")
    return result


def _place(result: Walk) -> str:
    return "data set" if result.pixel_length is None else "PixelData (7FE0,0010)"


def _next(stream: BinaryIO, implicit: bool, order: struct.Struct, in_un: bool) -> tuple[int, str, int] | None:
    """Return (tag, VR, length) of the element at the stream's position, VR "" where none is written; None at the end.

    In an explicit data set, items are implicit, and so is the content of a UN sequence (PS3.5 6.2.2). Some devices
    write VRs inside UN all the same: there a VR counts only if it exists, because the letters may be a length.
    """
    start = stream.read(8)
    if not start:
        return None
    if len(start) < 8:
        raise Unreadable("data set cut short within a tag")
    group, number, vr, length = order.unpack(start)
    has_vr = vr in VRS if in_un else b"AA" <= vr <= b"ZZ"
    if implicit or group == 0xFFFE or not has_vr:
        return group << 16 | number, "", struct.unpack(order.format[0] + "L", start[4:])[0]
    if vr in LONG_VRS:
        long_length = stream.read(4)
        if len(long_length) < 4:
            raise Unreadable("data set cut short within a tag")
        length = struct.unpack(order.format[0] + "L", long_length)[0]
    return group << 16 | number, vr.decode("latin-1"), length
