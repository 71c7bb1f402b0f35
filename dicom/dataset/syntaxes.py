"""The transfer syntaxes that we accept, in one table with the decoder of each code stream.

Works on code streams only. Must not import data sets, admission rules or plates.
"""

import os
import struct
from collections.abc import Callable
from functools import partial

import imagecodecs
import numpy as np

from dicom.dataset.part10 import DEFLATED_LE, EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE

JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
JPEG_LOSSLESS = "1.2.840.10008.1.2.4.57"
JPEG_LOSSLESS_SV1 = "1.2.840.10008.1.2.4.70"
JPEG_LS = "1.2.840.10008.1.2.4.80"
JPEG_LS_NEAR = "1.2.840.10008.1.2.4.81"
JPEG_2000_LOSSLESS = "1.2.840.10008.1.2.4.90"
JPEG_2000 = "1.2.840.10008.1.2.4.91"
HTJ2K_LOSSLESS = "1.2.840.10008.1.2.4.201"
HTJ2K_RPCL = "1.2.840.10008.1.2.4.202"
HTJ2K = "1.2.840.10008.1.2.4.203"
RLE = "1.2.840.10008.1.2.5"

# OpenJPEG decodes code blocks in parallel: with two threads a lossless image takes 0.45 s instead of 0.9 s
J2K_THREADS = min(4, os.cpu_count() or 1)
_jpeg2k = partial(imagecodecs.jpeg2k_decode, numthreads=J2K_THREADS)

# libjpeg-turbo 3 decodes 8, 12 and 16 bit, lossy and lossless; CharLS and OpenJPEG the rest
DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {
    JPEG_BASELINE: imagecodecs.jpeg8_decode,
    JPEG_EXTENDED: imagecodecs.jpeg8_decode,
    JPEG_LOSSLESS: imagecodecs.jpeg8_decode,
    JPEG_LOSSLESS_SV1: imagecodecs.jpeg8_decode,
    JPEG_LS: imagecodecs.jpegls_decode,
    JPEG_LS_NEAR: imagecodecs.jpegls_decode,
    JPEG_2000_LOSSLESS: _jpeg2k,
    JPEG_2000: _jpeg2k,
    HTJ2K_LOSSLESS: _jpeg2k,
    HTJ2K_RPCL: _jpeg2k,
    HTJ2K: _jpeg2k,
}
LOSSY = frozenset((JPEG_BASELINE, JPEG_EXTENDED, JPEG_LS_NEAR, JPEG_2000, HTJ2K))
SURELY_LOSSY = frozenset(
    (JPEG_BASELINE, JPEG_EXTENDED, JPEG_LS_NEAR)
)  # the other lossy syntaxes also allow reversible coding
SYNTAXES = (EXPLICIT_LE, IMPLICIT_LE, DEFLATED_LE, EXPLICIT_BE, *DECODERS, RLE)

_JPEG_FRAMES = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xF7))


def codestream_size(stream: bytes) -> tuple[int, int, int, int]:
    """Return the (rows, columns, components, bits) that a JPEG, JPEG-LS or JPEG 2000 code stream declares.

    Read before decoding, so that a huge code stream under a small header is rejected at no cost. Raises ValueError.
    """
    if stream[:4] == b"\xff\x4f\xff\x51":  # SOC, SIZ
        right, bottom, left, top = struct.unpack(">LLLL", stream[8:24])
        components, bits = struct.unpack(">HB", stream[40:43])
        return bottom - top, right - left, components, (bits & 0x7F) + 1
    if stream[:2] != b"\xff\xd8":
        raise ValueError("PixelData (7FE0,0010) holds no JPEG or JPEG 2000 code stream")
    at = 2
    while at + 4 <= len(stream):
        if stream[at] != 0xFF:
            break
        marker = stream[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in _JPEG_FRAMES:
            bits, rows, columns, components = struct.unpack(">BHHB", stream[at + 4 : at + 10])
            return rows, columns, components, bits
        at += 2 + struct.unpack(">H", stream[at + 2 : at + 4])[0]
    raise ValueError("PixelData (7FE0,0010): code stream without a frame header")


def is_complete(stream: bytes) -> bool:
    """Return whether the code stream ends with its end marker (EOI or EOC); padding behind it is ignored."""
    return b"\xff\xd9" in stream.rstrip(b"\0\xff")[-64:]


def strip_boxes(stream: bytes) -> bytes:
    """Return a JPEG 2000 code stream without the boxes of a JP2 file. Some encoders write them, against PS3.5 8.2.4."""
    return stream[stream.find(b"\xff\x4f\xff\x51") :] if stream[4:8] == b"jP  " else stream


def decode_rle(frame: bytes, rows: int, columns: int, allocated: int) -> np.ndarray:
    """Return one RLE frame (PS3.5 G) as uint8 or uint16 [rows, columns]. Raises ValueError."""
    segments = struct.unpack("<L", frame[:4])[0] if len(frame) >= 64 else 0
    if segments != allocated // 8:
        raise ValueError(f"RLE frame with {segments} segments for {allocated} bits")
    dtype = np.dtype("u1" if allocated == 8 else "<u2")
    plain = imagecodecs.dicomrle_decode(frame, dtype, out=rows * columns * dtype.itemsize)
    if len(plain) != rows * columns * dtype.itemsize:
        raise ValueError(f"RLE frame holds {len(plain)} bytes, not {rows} x {columns}")
    return np.frombuffer(plain, dtype).reshape(rows, columns)
