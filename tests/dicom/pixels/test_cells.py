"""Stored values that do not begin at bit 0 of their pixel cell (PS3.5 8.1.1), in every syntax."""

import shutil
import subprocess

import imagecodecs
import numpy as np
import pytest
from pydicom import dcmread

from dicom.dataset.syntaxes import JPEG_2000, JPEG_2000_LOSSLESS, JPEG_LS
from dicom.pixels.plate import decode
from tests.support.dicom.encoded_images import encapsulated
from tests.support.dicom.pacs import chest, save, xray

GREY = chest(96, 1, 12).astype(np.uint16)


def cells(high, signed=False):
    """Return a native image of 12 bits that end at bit `high`, and its stored values."""
    ds = xray(1, 96, 12)
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, high, int(signed)
    ds.PixelData = (GREY << np.uint16(high - 11)).astype("<u2").tobytes()
    return ds, (GREY.astype(np.int32) ^ 2048) - 2048 if signed else GREY.astype(np.int32)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("high", [11, 12, 15])
def test_a_code_stream_of_full_pixel_cells_is_shifted_like_native_pixels(high, signed):
    ds, stored = cells(high, signed)
    cell_values = np.frombuffer(ds.PixelData, "<u2").reshape(GREY.shape)
    assert (decode(ds) == stored).all()
    assert (decode(encapsulated(ds, JPEG_LS, imagecodecs.jpegls_encode(cell_values))) == stored).all()
    for syntax in (JPEG_2000_LOSSLESS, JPEG_2000):
        stream = imagecodecs.jpeg2k_encode(cell_values, codecformat="j2k", reversible=True, level=0, bitspersample=16)
        assert (decode(encapsulated(ds, syntax, stream)) == stored).all()


def test_a_code_stream_of_stored_bits_only_is_never_shifted():
    ds, stored = cells(15)
    stream = imagecodecs.jpeg2k_encode(GREY, codecformat="j2k", reversible=True, level=0, bitspersample=12)
    for syntax in (JPEG_2000_LOSSLESS, JPEG_2000):
        assert (decode(encapsulated(ds, syntax, stream)) == stored).all()


@pytest.mark.peer
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("high", [11, 12, 15])
@pytest.mark.parametrize(
    "encoder",
    [("dcmcrle",), ("dcmcjpeg", "+el", "+sv", "4"), ("dcmcjpeg", "+e1"), ("dcmcjpls", "+el")],
    ids=["RLE", "JPEG lossless", "JPEG lossless SV1", "JPEG-LS"],
)
def test_full_pixel_cells_encoded_by_dcmtk_are_decoded(tmp_path, encoder, high, signed):
    assert shutil.which(encoder[0])
    ds, stored = cells(high, signed)
    subprocess.run([*encoder, save(ds, tmp_path / "native.dcm"), tmp_path / "encoded.dcm"], check=True)
    assert (decode(dcmread(tmp_path / "encoded.dcm")) == stored).all()


@pytest.mark.parametrize("padding", [b"\0" * 2000, b"\xff" * 100, b""], ids=["zeros", "ones", "none"])
def test_padding_behind_a_code_stream_is_ignored(padding):
    ds, stored = cells(11)
    cell_values = bytes(imagecodecs.jpegls_encode(GREY))
    assert (decode(encapsulated(ds, JPEG_LS, cell_values + padding)) == stored).all()
    with pytest.raises(ValueError, match="cut short"):
        decode(encapsulated(ds, JPEG_LS, cell_values[:-100] + padding))


def test_the_boxes_of_a_jp2_file_are_removed():
    ds, stored = cells(11)
    boxed = imagecodecs.jpeg2k_encode(GREY, codecformat="jp2", reversible=True, level=0, bitspersample=12)
    assert (decode(encapsulated(ds, JPEG_2000_LOSSLESS, boxed)) == stored).all()
