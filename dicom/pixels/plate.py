"""Decode a data set to stored values, and render those as a plate: the one pixel path of training and serving.

Opens no file and rejects no image by its content. A decoding error is a ValueError whose text names the tag.
"""

import hashlib

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels.utils import pixel_array

from dicom.dataset import header
from dicom.dataset.part10 import EXPLICIT_BE, HOSTILE, NATIVE, items
from dicom.dataset.syntaxes import DECODERS, LOSSY, RLE, codestream_size, decode_rle, is_complete, strip_boxes
from dicom.pixels.grayscale import brightness
from dicom.pixels.letterbox import letterbox

CODEC_BYTES_PER_PIXEL = 16  # OpenJPEG works on 32-bit integers and keeps a second copy for the result


def to_plate(ds: Dataset) -> np.ndarray:
    """Return uint8 [512, 512], MONOCHROME2, letterboxed. Raises ValueError; BlankImage if all pixels are equal.

    Every change of a step raises `cxrloop.plate.PLATE_VERSION`.
    """
    return render(ds, decode(ds))


def decode(ds: Dataset) -> np.ndarray:
    """Return stored values without overlay bits, uint16 or int16 [rows, columns]. Raises ValueError."""
    syntax = str(ds.file_meta.TransferSyntaxUID)
    rows, columns = header.short(ds, "Rows") or 0, header.short(ds, "Columns") or 0
    allocated = header.short(ds, "BitsAllocated") or 16
    bits = header.short(ds, "BitsStored") or allocated
    high = header.short(ds, "HighBit")
    signed = header.short(ds, "PixelRepresentation") == 1
    aligned = 0 if high is None else high - bits + 1
    if syntax in NATIVE:
        return _integers(_native(ds, syntax, rows, columns, allocated), bits, aligned, signed)
    parts = items(ds["PixelData"].value)
    frame = b"".join(parts[1:])  # the first item is the offset table
    if syntax == RLE:
        return _integers(_rle(ds, frame, rows, columns, allocated), bits, aligned, signed)
    if syntax not in DECODERS:
        raise ValueError(f"TransferSyntaxUID (0002,0010) = {syntax}: cannot be decoded here")
    values, declared_bits = _codestream(ds, strip_boxes(frame), syntax, rows, columns)
    # some encoders compress whole pixel cells, others the stored bits alone: the declared bits tell them apart
    shift = aligned if high is not None and declared_bits > high else 0
    if syntax in LOSSY:  # a lossy decoder may exceed the range slightly: clip, do not wrap around
        top = 1 << bits + shift - signed
        if not (signed and values.dtype.kind == "u"):
            values = np.clip(values.astype(np.int32), -top if signed else 0, top - 1)
    return _integers(values, bits, shift, signed)


def _native(ds: Dataset, syntax: str, rows: int, columns: int, allocated: int) -> np.ndarray:
    data, needed = ds["PixelData"].value, rows * columns * allocated // 8
    if len(data) < needed:
        raise ValueError(f"PixelData (7FE0,0010) has {len(data)} bytes, {rows} x {columns} needs {needed}")
    big = syntax == EXPLICIT_BE
    if allocated == 8 and big and ds["PixelData"].VR == "OW":  # bytes travel in swapped pairs
        data = np.frombuffer(data[: needed + needed % 2], "<u2").byteswap().tobytes()
    dtype = "u1" if allocated == 8 else ">u2" if big else "<u2"
    return np.frombuffer(data, dtype, rows * columns).reshape(rows, columns)


def _rle(ds: Dataset, frame: bytes, rows: int, columns: int, allocated: int) -> np.ndarray:
    try:
        return decode_rle(frame, rows, columns, allocated)
    except (RuntimeError, ValueError):
        # some encoders write segments that are too long; pydicom cuts them off, pylibjpeg-rle panics (no Exception)
        try:
            return pixel_array(ds, raw=True, decoding_plugin="pydicom").reshape(rows, columns)
        except HOSTILE as error:
            raise ValueError("PixelData (7FE0,0010): no decoder could read the RLE frame") from error


def _codestream(ds: Dataset, frame: bytes, syntax: str, rows: int, columns: int) -> tuple[np.ndarray, int]:
    """Return (values, declared bits per value) of the code stream."""
    *size, bits = codestream_size(frame)
    if size != [rows, columns, 1]:
        raise ValueError(
            f"PixelData (7FE0,0010): code stream of {size[0]} x {size[1]} x {size[2]}, header says {rows} x {columns}"
        )
    if not is_complete(frame):
        raise ValueError("PixelData (7FE0,0010): code stream is cut short")
    try:
        values = DECODERS[syntax](frame)
    except (RuntimeError, ValueError):  # imagecodecs' errors; try the second decoder
        # the codec does not report a lack of memory: this allocation raises MemoryError in that case
        np.empty(CODEC_BYTES_PER_PIXEL * rows * columns, np.uint8)
        try:
            values = pixel_array(ds, raw=True, decoding_plugin="pylibjpeg")
        except HOSTILE as error:
            raise ValueError(f"PixelData (7FE0,0010): no decoder could read the code stream of {syntax}") from error
    if values.shape != (rows, columns):
        raise ValueError(f"PixelData (7FE0,0010): decoded to {values.shape}, header says {rows} x {columns}")
    return values, bits


def _integers(values: np.ndarray, bits: int, shift: int, signed: bool) -> np.ndarray:
    """Return the `bits` bits from bit `shift` on as uint16, or sign-extended as int16."""
    plain = values.astype(np.uint16)
    if shift:
        plain >>= np.uint16(shift)
    if bits < 16:
        plain &= np.uint16((1 << bits) - 1)
    if not signed:
        return plain
    sign = np.uint16(1 << bits - 1)
    return ((plain ^ sign) - sign).view(np.int16)


def pixel_sha256(stored: np.ndarray) -> str:
    """Return the hex sha256 of dtype, shape and little-endian bytes: equal for one image in every lossless syntax."""
    digest = hashlib.sha256(f"{stored.dtype.kind}{stored.dtype.itemsize} {stored.shape}".encode())
    digest.update(np.ascontiguousarray(stored, stored.dtype.newbyteorder("<")).data)
    return digest.hexdigest()


def render(ds: Dataset, stored: np.ndarray) -> np.ndarray:
    """Return uint8 [512, 512] from stored values, by the header's look-up tables. Raises ValueError, BlankImage."""
    lowest = int(stored.min())
    index = stored if lowest == 0 and stored.dtype == np.uint16 else stored.astype(np.int32) - lowest
    counts = np.bincount(index.ravel())
    plate = letterbox(_image(ds, lowest, counts, index))
    if plate.min() == plate.max():  # the window misses all values: use the image's own range instead of a black plate
        plate = letterbox(_image(ds, lowest, counts, index, windowed=False))
    return plate


def _image(ds: Dataset, lowest: int, counts: np.ndarray, index: np.ndarray, windowed: bool = True) -> np.ndarray:
    return np.take((brightness(ds, lowest, counts, windowed) * 255).astype(np.float32), index)
