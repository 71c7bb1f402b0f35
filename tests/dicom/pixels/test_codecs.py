"""Stored values decoded from every syntax, compared with the encoded values and with other decoders."""

import struct

import imagecodecs
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.uid import RLELossless

from dicom.dataset.part10 import items
from dicom.dataset.syntaxes import (
    EXPLICIT_BE,
    HTJ2K,
    HTJ2K_LOSSLESS,
    HTJ2K_RPCL,
    JPEG_2000,
    JPEG_2000_LOSSLESS,
    JPEG_BASELINE,
    JPEG_EXTENDED,
    JPEG_LOSSLESS_SV1,
    JPEG_LS,
    JPEG_LS_NEAR,
    RLE,
)
from dicom.phantom.wrap import wrap
from dicom.pixels.plate import decode, pixel_sha256, render, to_plate
from tests.support.dicom.encoded_images import LOSSLESS, encapsulated, in_syntax, written_and_read
from tests.support.dicom.pacs import chest, xray


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("syntax", LOSSLESS)
def test_one_image_in_every_lossless_syntax_has_one_pixel_hash_and_plate(tmp_path, syntax, bits):
    plain = xray(1, 96, bits)
    decoded = decode(written_and_read(in_syntax(syntax, 1, bits), tmp_path))
    assert decoded.dtype == np.uint16
    assert (decoded == chest(96, 1, bits)).all()
    assert pixel_sha256(decoded) == pixel_sha256(decode(plain))
    assert (render(plain, decoded) == to_plate(plain)).all()


@pytest.mark.parametrize("name", ["RG1_UNCR.dcm", "RG1_J2KR.dcm", "RG1_J2KI.dcm", "RG3_UNCR.dcm", "RG3_J2KR.dcm"])
def test_real_images_decode_as_pydicom_decodes_them(name):
    path = get_testdata_file(name, download=False)
    assert path, "pydicom-data is a development dependency"
    ds = dcmread(path)
    assert (decode(ds) == ds.pixel_array).all()


@pytest.mark.parametrize("image_name", ["RG1", "RG3"])
def test_a_real_image_has_one_pixel_hash_raw_and_in_jpeg_2000(image_name):
    raw, lossless, lossy = (
        pixel_sha256(decode(dcmread(get_testdata_file(f"{image_name}_{kind}.dcm", download=False))))
        for kind in ("UNCR", "J2KR", "J2KI")
    )
    assert raw == lossless
    assert raw != lossy


@pytest.mark.parametrize(
    "name",
    [
        "MR_small.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "J2K_pixelrep_mismatch.dcm",
        "JPEG-LL.dcm",
        "JPEGLSNearLossless_16.dcm",
        "693_J2KR.dcm",
        "image_dfl.dcm",
    ],
)
def test_signed_and_odd_files_of_pydicom_decode_as_pydicom_decodes_them(name):
    ds = dcmread(get_testdata_file(name, download=False))
    decoded = decode(ds)
    assert (decoded == ds.pixel_array).all()
    assert decoded.dtype == (np.int16 if ds.PixelRepresentation else np.uint16)


def test_lossy_jpeg_of_8_and_12_bits(tmp_path):
    eight = encapsulated(xray(2), JPEG_BASELINE, imagecodecs.jpeg8_encode(chest(96, 2), level=95))
    twelve = encapsulated(
        xray(2, bits=12), JPEG_EXTENDED, imagecodecs.jpeg8_encode(chest(96, 2, 12), level=95, bitspersample=12)
    )
    near = encapsulated(xray(2, bits=12), JPEG_LS_NEAR, imagecodecs.jpegls_encode(chest(96, 2, 12), level=2))
    wavelet = encapsulated(
        xray(2, bits=12), JPEG_2000, imagecodecs.jpeg2k_encode(chest(96, 2, 12), codecformat="j2k", level=60)
    )
    for ds, bits, tolerance in ((eight, 8, 12), (twelve, 12, 120), (near, 12, 2), (wavelet, 12, 400)):
        decoded = decode(written_and_read(ds, tmp_path)).astype(int)
        assert abs(decoded - chest(96, 2, bits)).max() <= tolerance


def test_a_lossy_decoder_that_overshoots_is_clipped_not_wrapped():
    stream = imagecodecs.jpegls_encode(np.full((96, 96), 1030, np.uint16))
    ds = xray(bits=12)
    ds.BitsStored, ds.HighBit = 10, 9
    assert decode(encapsulated(ds, JPEG_LS_NEAR, stream)).max() == 1023


def test_a_code_stream_in_several_fragments_is_one_frame(tmp_path):
    ds = xray(transfer_syntax=JPEG_LS)
    stream = imagecodecs.jpegls_encode(chest(96))
    ds.PixelData = encapsulate([stream], fragments_per_frame=3)
    ds["PixelData"].is_undefined_length = True
    assert (decode(written_and_read(ds, tmp_path)) == chest(96)).all()


@pytest.mark.parametrize("syntax", [JPEG_LS, JPEG_2000_LOSSLESS, JPEG_LOSSLESS_SV1])
def test_a_code_stream_that_is_cut_short_is_refused(syntax):
    ds = in_syntax(syntax)
    stream = items(ds.PixelData)[1]
    with pytest.raises(ValueError, match="cut short"):
        decode(encapsulated(ds, syntax, stream[: len(stream) // 2]))


def test_a_code_stream_of_another_size_is_refused():
    ds = in_syntax(JPEG_LS)
    ds.Rows = 95
    with pytest.raises(ValueError, match="code stream of 96 x 96 x 1, header says 95 x 96"):
        decode(ds)


def test_rle_that_is_too_short_is_refused():
    ds = in_syntax(RLE)
    ds.Rows = ds.Columns = 128
    with pytest.raises(ValueError):
        decode(ds)


def rle_frame(segments, tail=b""):
    """Return an RLE frame of these segments (PS3.5 G), with its header."""
    starts = np.cumsum([64, *(len(segment) for segment in segments)])[:-1].tolist()
    return struct.pack("<16L", len(segments), *starts, *[0] * (15 - len(segments))) + b"".join(segments) + tail


@pytest.mark.parametrize(
    ("extra", "tail"), [(b"", b""), (b"\0\0", b""), (b"\x80\x80", b""), (b"\xf0\0", b""), (b"", b"\0" * 10)]
)
def test_rle_segments_that_are_too_long_are_cut(tmp_path, extra, tail):
    ds = xray(1, 96, 12)
    ds.compress(RLELossless, generate_instance_uid=False)
    frame = items(ds.PixelData)[1]
    first, second = struct.unpack("<LL", frame[4:12])
    sloppy = rle_frame([frame[first:second] + extra, frame[second:] + extra], tail)
    assert (decode(written_and_read(encapsulated(ds, RLE, sloppy), tmp_path)) == chest(96, 1, 12)).all()
    with pytest.raises(ValueError, match="no decoder could read the RLE frame"):
        decode(encapsulated(ds, RLE, rle_frame([frame[first:second], frame[second:-400]])))


def test_bits_outside_bits_stored_are_removed():
    pixels = chest(96, 0, 12)
    ds = xray(bits=12)
    ds.PixelData = (pixels | np.uint16(0xA000)).tobytes()
    assert (decode(ds) == pixels).all()
    ds.PixelData, ds.HighBit = (pixels << 4).tobytes(), 15
    assert (decode(ds) == pixels).all()


def test_signed_values_are_extended_from_their_highest_bit():
    values = np.arange(-2048, 2048, dtype=np.int16).reshape(64, 64)
    ds = wrap(np.zeros((64, 64), np.uint16), "P1", bits=12)
    ds.PixelRepresentation = 1
    ds.PixelData = (values.view(np.uint16) & 0x0FFF).tobytes()
    decoded = decode(ds)
    assert decoded.dtype == np.int16
    assert (decoded == values).all()


def test_eight_bit_words_in_big_endian_are_swapped(tmp_path):
    pixels = chest(97, 4)
    ds = wrap(pixels, "P1", transfer_syntax=EXPLICIT_BE)
    padded = np.frombuffer(pixels.tobytes() + b"\0", "<u2").byteswap().tobytes()
    ds.PixelData = padded
    ds["PixelData"].VR = "OW"
    read = written_and_read(ds, tmp_path)
    assert (decode(read) == pixels).all()
    assert (decode(read) == read.pixel_array).all()


def test_different_images_have_different_pixel_hashes():
    values = np.arange(64, dtype=np.uint16).reshape(8, 8)
    hashes = {
        pixel_sha256(array)
        for array in (values, values.T, values.reshape(4, 16), values.view(np.int16), values + np.uint16(1))
    }
    assert len(hashes) == 5


def test_every_high_throughput_jpeg_2000_is_decoded(tmp_path):
    pixels = chest(96, 3, 12)
    for syntax, reversible, tolerance in ((HTJ2K_LOSSLESS, True, 0), (HTJ2K_RPCL, True, 0), (HTJ2K, False, 40)):
        ds = encapsulated(xray(3, bits=12), syntax, imagecodecs.htj2k_encode(pixels, reversible=reversible))
        assert np.abs(decode(written_and_read(ds, tmp_path)).astype(int) - pixels).max() <= tolerance


def test_the_second_decoder_reads_what_the_first_cannot(tmp_path):
    ds, stream = xray(5, bits=12), bytearray(imagecodecs.jpegls_encode(chest(96, 5, 12)))
    ds = encapsulated(ds, JPEG_LS, stream)
    ds.file_meta.TransferSyntaxUID = (
        JPEG_LOSSLESS_SV1  # declares JPEG lossless, contains JPEG-LS: libjpeg-turbo fails, libjpeg decodes it
    )
    assert (decode(written_and_read(ds, tmp_path)) == chest(96, 5, 12)).all()


def test_the_error_of_an_undecodable_code_stream_names_its_syntax():
    ds = in_syntax(JPEG_LS)
    stream = bytearray(items(ds.PixelData)[1])
    start = stream.index(b"\xff\xda") + 2
    stream[start : start + 40] = b"\xff" * 40
    with pytest.raises(ValueError, match=f"no decoder could read the code stream of {JPEG_LS}"):
        decode(encapsulated(ds, JPEG_LS, stream))
