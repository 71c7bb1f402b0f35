"""Finding the pixels: every cut is detected, at any depth of sequences, with little memory."""

import io
import struct
import tracemalloc

import pytest

from dicom.dataset import header
from dicom.dataset.elements import ITEM, ITEM_END, MAX_ELEMENTS, SEQUENCE_END, UNDEFINED
from dicom.dataset.part10 import DEFLATED_LE, EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE, read_header
from dicom.dataset.syntaxes import JPEG_2000_LOSSLESS
from dicom.errors import Unreadable
from tests.support.dicom.pacs import data_set, xray

PIXELS = struct.pack("<HH2sHL", 0x7FE0, 0x0010, b"OW", 0, 4) + b"\1\2\3\4"
UID = struct.pack("<HH2sH", 8, 0x0018, b"UI", 8) + b"1.2.3.4\0"


def private_element(vr, value=b"", length=None):
    return struct.pack("<HH2sHL", 9, 0x1010, vr, 0, len(value) if length is None else length) + value


def item_tag(tag, length=0):
    return struct.pack("<HHL", tag >> 16, tag & 0xFFFF, length)


@pytest.mark.parametrize("syntax", [EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE, JPEG_2000_LOSSLESS])
def test_every_cut_within_an_element_is_detected(syntax):
    ds = xray(transfer_syntax=syntax)
    data = data_set(ds)
    before_pixels = read_header(io.BytesIO(data), syntax).pixel_offset
    undetected = 0
    for length in range(1, before_pixels):
        try:
            header_read = read_header(io.BytesIO(data[:length]), syntax, pixels=False)
        except Unreadable:
            continue
        assert header_read.pixel_length is None
        undetected += 1
    assert undetected == len(ds) - 1  # after each element but the last, PixelData


@pytest.mark.parametrize("vr", [b"SQ", b"UN"])
@pytest.mark.parametrize("depth", [1, 100, 5000])
def test_sequences_of_any_depth_are_followed_to_their_end(vr, depth):
    inner = item_tag(0x00091011, 2) + b"ab" if vr == b"UN" else b""  # the content of UN is implicit (PS3.5 6.2.2)
    nested = (private_element(vr, length=UNDEFINED) + item_tag(ITEM, UNDEFINED)) * depth + inner
    nested += (item_tag(ITEM_END) + item_tag(SEQUENCE_END)) * depth
    header_read = read_header(io.BytesIO(UID + nested + PIXELS), EXPLICIT_LE, pixels=False)
    assert (header.text(header_read.dataset, "SOPInstanceUID"), header_read.pixel_length) == ("1.2.3.4", 4)
    for cut in (8, 16):
        with pytest.raises(Unreadable):
            read_header(io.BytesIO(UID + nested[:-cut] + PIXELS), EXPLICIT_LE, pixels=False)


def test_a_uid_within_a_sequence_is_not_the_uid_of_the_image():
    nested_uid = struct.pack("<HH2sH", 8, 0x0018, b"UI", 4) + b"9.9\0"
    nested = (
        private_element(b"SQ", length=UNDEFINED)
        + item_tag(ITEM, UNDEFINED)
        + nested_uid
        + item_tag(ITEM_END)
        + item_tag(SEQUENCE_END)
    )
    header_read = read_header(io.BytesIO(UID + nested + PIXELS), EXPLICIT_LE, pixels=False)
    assert header.text(header_read.dataset, "SOPInstanceUID") == "1.2.3.4"


@pytest.mark.parametrize("syntax", [EXPLICIT_LE, DEFLATED_LE, JPEG_2000_LOSSLESS])
def test_the_short_and_the_full_header_agree(syntax):
    data = data_set(xray(transfer_syntax=syntax))
    short, long = (read_header(io.BytesIO(data), syntax, pixels=pixels) for pixels in (False, True))
    assert (short.pixel_length, short.pixel_vr, short.pixel_offset) == (
        long.pixel_length,
        long.pixel_vr,
        long.pixel_offset,
    )
    for keyword in ("SOPClassUID", "SOPInstanceUID", "PatientID", "StudyInstanceUID"):
        assert header.text(short.dataset, keyword) == header.text(long.dataset, keyword) != ""


def test_values_that_are_not_wanted_are_not_kept_in_memory():
    data = io.BytesIO(UID + private_element(b"OB", bytes(64 << 20)) + PIXELS)
    tracemalloc.start()
    assert read_header(data, EXPLICIT_LE, pixels=False).pixel_length == 4
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("what", ["elements", "items", "fragments"])
def test_an_endless_data_set_is_given_up(what):
    if what == "elements":
        data = UID + b"".join(
            struct.pack("<HH2sH", 9 + 2 * (n >> 15), n & 0x7FFF, b"LO", 0) for n in range(MAX_ELEMENTS)
        )
    elif what == "items":
        data = UID + private_element(b"SQ", length=UNDEFINED) + item_tag(ITEM) * MAX_ELEMENTS + item_tag(SEQUENCE_END)
    else:
        data = UID + PIXELS[:8] + struct.pack("<L", UNDEFINED) + item_tag(ITEM) * MAX_ELEMENTS + item_tag(SEQUENCE_END)
    with pytest.raises(Unreadable, match=f"more than {MAX_ELEMENTS} elements"):
        read_header(io.BytesIO(data), EXPLICIT_LE, pixels=False)


def test_within_a_sequence_of_unknown_vr_a_length_that_looks_like_a_vr_is_a_length():
    length = struct.unpack("<H", b"BB")[0]  # 16,962 bytes, at the place of the VR in an explicit element
    inner = item_tag(ITEM, UNDEFINED) + struct.pack("<HHL", 9, 0x1002, length) + bytes(length) + item_tag(ITEM_END)
    data = UID + private_element(b"UN", length=UNDEFINED) + inner + item_tag(SEQUENCE_END) + PIXELS
    header_read = read_header(io.BytesIO(data), EXPLICIT_LE, pixels=False)
    assert header.text(header_read.dataset, "SOPInstanceUID") == "1.2.3.4" and header_read.pixel_length == 4
