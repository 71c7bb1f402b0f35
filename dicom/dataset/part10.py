"""The envelope of a DICOM file (PS3.10): preamble, file meta, start of the data set, its hash and its header.

Inflates up to a limit and decodes no pixels. Must not import admission rules.
"""

import hashlib
import os
import re
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_dataset
from pydicom.uid import UID

from dicom.dataset.elements import LONG_VRS, PIXEL_DATA, UNDEFINED, walk
from dicom.errors import Unreadable

IMPLICIT_LE = "1.2.840.10008.1.2"
EXPLICIT_LE = "1.2.840.10008.1.2.1"
DEFLATED_LE = "1.2.840.10008.1.2.1.99"
EXPLICIT_BE = "1.2.840.10008.1.2.2"
NATIVE = (EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE, DEFLATED_LE)

IMPLEMENTATION_UID = "1.2.826.0.1.3680043.8.498.7427.1"
IMPLEMENTATION_NAME = "CXRLOOP_1"
MAX_INFLATED = 256 << 20  # bytes; an image of the largest detector has 50 MB, so more than this is an attack
HEAD = 32 << 20  # bytes of an inflated data set that contain its header, overlays and icons included
ITEM = b"\xfe\xff\x00\xe0"  # (FFFE,E000), always little endian: no compressed syntax is big
# SpecificCharacterSet, SOP class and instance, PatientID and its issuer, StudyInstanceUID
IDENTITY = frozenset((0x00080005, 0x00080016, 0x00080018, 0x00100020, 0x00100021, 0x0020000D))

# What pydicom and numpy may raise for hostile bytes; any other exception is our own bug and must stay visible.
HOSTILE = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    ArithmeticError,
    EOFError,
    NotImplementedError,
    RuntimeError,  # RecursionError, and the codecs' own errors
    AssertionError,
    struct.error,
    zlib.error,
)

_UID = re.compile(r"[0-9]+(\.[0-9]+)+")


@dataclass(frozen=True)
class Envelope:
    """What the file meta contains."""

    transfer_syntax: str
    offset: int  # bytes before the data set
    sop_uid: str = ""  # MediaStorageSOPInstanceUID (0002,0003); not checked against the data set


@dataclass(frozen=True)
class Header:
    """The elements before the pixels, and the declared length of the pixels (None: no pixels)."""

    dataset: Dataset
    pixel_length: int | None  # UNDEFINED: encapsulated
    pixel_vr: str
    stream: BinaryIO  # contains the pixels: the file itself, or the inflated data set
    pixel_offset: int  # of the first byte of the pixel value in `stream`

    def pixel_bytes(self) -> bytes:
        """Return the encoded pixel value; for encapsulated pixels its items and the delimiter."""
        self.stream.seek(self.pixel_offset)
        return self.stream.read(-1 if self.pixel_length == UNDEFINED else self.pixel_length or 0)

    def with_pixels(self, syntax: str) -> Dataset:
        """Add transfer syntax and encoded pixels to `dataset`, and return it; `dicom.pixels` can decode it then."""
        ds = self.dataset
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = UID(syntax)
        ds[PIXEL_DATA] = DataElement(PIXEL_DATA, self.pixel_vr, self.pixel_bytes(), already_converted=True)
        return ds


def is_uid(text: str | None) -> bool:
    """Return whether `text` is a UID: digits and dots, at most 64. Leading zeros pass: they are common and harmless."""
    return text is not None and len(text) <= 64 and _UID.fullmatch(text) is not None


def open_envelope(stream: BinaryIO) -> Envelope:
    """Read preamble and file meta; leave the stream at the data set. Raises Unreadable."""
    head = stream.read(132)
    if not head:
        raise Unreadable("empty file")
    if head[128:] != b"DICM":
        raise Unreadable("no DICM prefix: not a DICOM file")
    syntax = sop_uid = ""
    while True:
        offset = stream.tell()
        start = stream.read(8)
        if len(start) < 8 or start[:2] != b"\x02\x00":
            break
        element, vr, length = struct.unpack("<2xH2sH", start)
        if vr in LONG_VRS:
            length = struct.unpack("<L", _exactly(stream, 4))[0]
        value = _exactly(stream, length)
        if element == 0x0010:
            syntax = value.decode("latin-1").strip("\0 ")
        elif element == 0x0003:
            sop_uid = value.decode("latin-1").strip("\0 ")
    if not is_uid(syntax):
        raise Unreadable(f"TransferSyntaxUID (0002,0010) = {shown(syntax)}: missing or not a UID")
    stream.seek(offset)
    return Envelope(syntax, offset, sop_uid)


def _exactly(stream: BinaryIO, length: int) -> bytes:
    if length > 1 << 16:
        raise Unreadable(f"file meta element of {length} bytes")
    value = stream.read(length)
    if len(value) < length:
        raise Unreadable("file ends within the file meta")
    return value


def content_sha256(path: Path) -> str:
    """Return the hex sha256 of transfer syntax UID + data set; of the whole file if its envelope is unreadable."""
    with path.open("rb") as stream:
        try:
            envelope = open_envelope(stream)
            digest = hashlib.sha256(envelope.transfer_syntax.encode() + b"\0")
        except Unreadable:
            stream.seek(0)
            digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def inflate(stream: BinaryIO, limit: int = MAX_INFLATED, keep: int = MAX_INFLATED) -> tuple[bytes, int]:
    """Return the first `keep` bytes of an inflated data set (raw deflate, PS3.5 A.5) and its full length in bytes.

    Raises Unreadable beyond `limit` bytes or when cut short. Uses little more memory than `keep`.
    """
    engine, kept, total = zlib.decompressobj(-zlib.MAX_WBITS), [], 0
    try:
        while (block := stream.read(1 << 12)) and not engine.eof:  # deflate grows 1032 times at most
            piece = engine.decompress(block)
            if total < keep:
                kept.append(piece)
            total += len(piece)
            if total > limit:
                raise Unreadable(f"deflated data set grows beyond {limit >> 20} MiB")
    except zlib.error as error:
        raise Unreadable(f"deflated data set: {error}") from error
    if not engine.eof:
        raise Unreadable("deflated data set cut short")
    return b"".join(kept), total


def read_header(stream: BinaryIO, syntax: str, pixels: bool = True) -> Header:
    """Return the header of the data set that begins at the stream's position. Raises Unreadable.

    Checks that the first element is encoded as `syntax` requires, that no value is cut short, and that the stream
    contains the declared pixel length. Takes about a millisecond; reads no pixels, but inflates a deflated data set.
    With `pixels` False the result contains only the elements of IDENTITY, and its `pixel_bytes` must not be used.
    """
    uid, size = UID(syntax), _size(stream)
    if syntax == DEFLATED_LE:
        head, size = inflate(stream, keep=MAX_INFLATED if pixels else HEAD)
        stream = BytesIO(head)
    implicit, little = syntax == IMPLICIT_LE, syntax != EXPLICIT_BE
    if not uid.is_transfer_syntax and not uid.is_private:
        raise Unreadable(f"TransferSyntaxUID (0002,0010) = {shown(syntax)}: not a transfer syntax")
    start = stream.tell()
    first = stream.read(8)
    stream.seek(start)
    if len(first) < 8:
        raise Unreadable("no data set")
    group = struct.unpack("<H" if little else ">H", first[:2])[0]
    looks_explicit = first[4:6].isalpha() and first[4:6].isupper()
    if looks_explicit == implicit or not 0x0004 <= group <= 0x7FE0:
        raise Unreadable("data set is not encoded as its transfer syntax says")
    layout = walk(stream, implicit, little, size, IDENTITY)
    if not pixels:
        return Header(Dataset(layout.kept), layout.pixel_length, layout.pixel_vr, stream, layout.pixel_offset)
    stream.seek(start)
    try:
        ds = read_dataset(stream, implicit, little, stop_when=lambda tag, vr, length: tag >= 0x7FE00000)
    except HOSTILE as error:
        raise Unreadable(f"data set not readable: {type(error).__name__}") from error
    return Header(ds, layout.pixel_length, layout.pixel_vr, stream, layout.pixel_offset)


def items(encapsulated: bytes) -> list[bytes]:
    """Return the items of an encapsulated pixel value, the offset table first; tolerates a missing delimiter."""
    values, at = [], 0
    while at + 8 <= len(encapsulated):
        tag, length = struct.unpack_from("<4sL", encapsulated, at)
        if tag != ITEM:
            break
        values.append(encapsulated[at + 8 : at + 8 + length])
        at += 8 + length
    return values


def _size(stream: BinaryIO) -> int:
    here = stream.tell()
    end = stream.seek(0, os.SEEK_END)
    stream.seek(here)
    return end


def file_meta(sop_class: str, sop_uid: str, syntax: str) -> bytes:
    """Return preamble, prefix and file meta (PS3.10 7.1) for a data set that was received without them."""

    def ui(element: int, value: str) -> bytes:
        padded = value.encode("ascii") + b"\0" * (len(value) % 2)
        return struct.pack("<HH2sH", 2, element, b"UI", len(padded)) + padded

    body = struct.pack("<HH2sHL2s", 2, 1, b"OB", 0, 2, b"\0\1")
    body += ui(2, sop_class) + ui(3, sop_uid) + ui(0x10, syntax) + ui(0x12, IMPLEMENTATION_UID)
    name = IMPLEMENTATION_NAME.encode().ljust(len(IMPLEMENTATION_NAME) + len(IMPLEMENTATION_NAME) % 2)
    body += struct.pack("<HH2sH", 2, 0x13, b"SH", len(name)) + name
    return b"\0" * 128 + b"DICM" + struct.pack("<HH2sHL", 2, 0, b"UL", 4, len(body)) + body


def shown(value: object) -> str:
    """Return a header value for a log line: printable ASCII, at most 40 characters, "empty" when there is none."""
    text = re.sub(r"[^ -~]", "?", str(value)).strip()
    return (text[:40] + "...") if len(text) > 40 else text or "empty"
