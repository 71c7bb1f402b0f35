"""The pixel path: stored values, brightness, letterbox; each step against a second implementation."""

import imagecodecs
import numpy as np
import pytest
from pacs import chest, film, save
from PIL import Image as Picture
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence
from pydicom.uid import RLELossless

from dicom.part10 import items
from dicom.pixels import Blank, decode, pixel_sha256, render, to_plate
from dicom.resize import letterbox, taps
from dicom.syntaxes import (
    DEFLATED_LE,
    EXPLICIT_BE,
    EXPLICIT_LE,
    HTJ2K_LOSSLESS,
    IMPLICIT_LE,
    JPEG_2000,
    JPEG_2000_LOSSLESS,
    JPEG_BASELINE,
    JPEG_EXTENDED,
    JPEG_LOSSLESS_SV1,
    JPEG_LS,
    JPEG_LS_NEAR,
    RLE,
)
from dicom.wrap import wrap


def again(ds, tmp_path):
    """The film written and read back, as it would come from a PACS."""
    return dcmread(save(ds, tmp_path / "again.dcm"))


def encapsulated(ds, syntax, stream):
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate([bytes(stream)])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    return ds


def in_syntax(syntax, seed=0, bits=12, side=96):
    """One film in any lossless syntax, each written by somebody else's encoder."""
    pixels = chest(side, seed, bits)
    if syntax in (EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE, DEFLATED_LE, JPEG_2000_LOSSLESS, JPEG_LS):
        return film(seed, side, bits, transfer_syntax=syntax)
    ds = film(seed, side, bits)
    if syntax == RLE:
        ds.compress(RLELossless, generate_instance_uid=False)
        return ds
    if syntax == JPEG_LOSSLESS_SV1:
        return encapsulated(ds, syntax, imagecodecs.ljpeg_encode(pixels, bitspersample=bits))
    return encapsulated(ds, syntax, imagecodecs.htj2k_encode(pixels, reversible=True))


LOSSLESS = (
    EXPLICIT_LE,
    IMPLICIT_LE,
    EXPLICIT_BE,
    DEFLATED_LE,
    RLE,
    JPEG_LOSSLESS_SV1,
    JPEG_LS,
    JPEG_2000_LOSSLESS,
    HTJ2K_LOSSLESS,
)


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("syntax", LOSSLESS)
def test_one_film_in_every_lossless_syntax_has_one_pixel_hash_and_plate(tmp_path, syntax, bits):
    plain = film(1, 96, bits)
    found = decode(again(in_syntax(syntax, 1, bits), tmp_path))
    assert found.dtype == np.uint16
    assert (found == chest(96, 1, bits)).all()
    assert pixel_sha256(found) == pixel_sha256(decode(plain))
    assert (render(plain, found) == to_plate(plain)).all()


@pytest.mark.parametrize("name", ["RG1_UNCR.dcm", "RG1_J2KR.dcm", "RG1_J2KI.dcm", "RG3_UNCR.dcm", "RG3_J2KR.dcm"])
def test_real_films_decode_as_pydicom_decodes_them(name):
    path = get_testdata_file(name, download=False)
    assert path, "pydicom-data is a development dependency"
    ds = dcmread(path)
    assert (decode(ds) == ds.pixel_array).all()


@pytest.mark.parametrize("film_name", ["RG1", "RG3"])
def test_a_real_film_has_one_pixel_hash_raw_and_in_jpeg_2000(film_name):
    raw, lossless, lossy = (
        pixel_sha256(decode(dcmread(get_testdata_file(f"{film_name}_{kind}.dcm", download=False))))
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
    found = decode(ds)
    assert (found == ds.pixel_array).all()
    assert found.dtype == (np.int16 if ds.PixelRepresentation else np.uint16)


def test_lossy_jpeg_of_8_and_12_bits(tmp_path):
    eight = encapsulated(film(2), JPEG_BASELINE, imagecodecs.jpeg8_encode(chest(96, 2), level=95))
    twelve = encapsulated(
        film(2, bits=12), JPEG_EXTENDED, imagecodecs.jpeg8_encode(chest(96, 2, 12), level=95, bitspersample=12)
    )
    near = encapsulated(film(2, bits=12), JPEG_LS_NEAR, imagecodecs.jpegls_encode(chest(96, 2, 12), level=2))
    wavelet = encapsulated(
        film(2, bits=12), JPEG_2000, imagecodecs.jpeg2k_encode(chest(96, 2, 12), codecformat="j2k", level=60)
    )
    for ds, bits, off in ((eight, 8, 12), (twelve, 12, 120), (near, 12, 2), (wavelet, 12, 400)):
        found = decode(again(ds, tmp_path)).astype(int)
        assert abs(found - chest(96, 2, bits)).max() <= off


def test_a_lossy_decoder_that_overshoots_is_clipped_not_wrapped():
    stream = imagecodecs.jpegls_encode(np.full((96, 96), 1030, np.uint16))
    ds = film(bits=12)
    ds.BitsStored, ds.HighBit = 10, 9
    assert decode(encapsulated(ds, JPEG_LS_NEAR, stream)).max() == 1023


def test_a_code_stream_in_several_fragments_is_one_frame(tmp_path):
    ds = film(transfer_syntax=JPEG_LS)
    stream = imagecodecs.jpegls_encode(chest(96))
    ds.PixelData = encapsulate([stream], fragments_per_frame=3)
    ds["PixelData"].is_undefined_length = True
    assert (decode(again(ds, tmp_path)) == chest(96)).all()


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


def test_bits_outside_the_stored_ones_are_cut_off():
    pixels = chest(96, 0, 12)
    ds = film(bits=12)
    ds.PixelData = (pixels | np.uint16(0xA000)).tobytes()
    assert (decode(ds) == pixels).all()
    ds.PixelData, ds.HighBit = (pixels << 4).tobytes(), 15
    assert (decode(ds) == pixels).all()


def test_signed_values_are_extended_from_their_highest_bit():
    values = np.arange(-2048, 2048, dtype=np.int16).reshape(64, 64)
    ds = wrap(np.zeros((64, 64), np.uint16), "P1", bits=12)
    ds.PixelRepresentation = 1
    ds.PixelData = (values.view(np.uint16) & 0x0FFF).tobytes()
    found = decode(ds)
    assert found.dtype == np.int16
    assert (found == values).all()


def test_eight_bit_words_in_big_endian_are_swapped(tmp_path):
    pixels = chest(97, 4)
    ds = wrap(pixels, "P1", transfer_syntax=EXPLICIT_BE)
    padded = np.frombuffer(pixels.tobytes() + b"\0", "<u2").byteswap().tobytes()
    ds.PixelData = padded
    ds["PixelData"].VR = "OW"
    read = again(ds, tmp_path)
    assert (decode(read) == pixels).all()
    assert (decode(read) == read.pixel_array).all()


def test_the_pixel_hash_tells_films_apart():
    values = np.arange(64, dtype=np.uint16).reshape(8, 8)
    hashes = {
        pixel_sha256(array)
        for array in (values, values.T, values.reshape(4, 16), values.view(np.int16), values + np.uint16(1))
    }
    assert len(hashes) == 5


# From stored values to brightness


def plain(pixels, **values):
    ds = wrap(pixels, "P1", bits=values.pop("bits", None))
    del ds.WindowCenter, ds.WindowWidth
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return ds


RAMP = np.arange(512 * 512, dtype=np.uint32).reshape(512, 512)
RAMP12 = (RAMP // 64).astype(np.uint16)  # every 12-bit value 64 times, at the plate's own size: no resampling


def close(plate, expected):
    return np.abs(plate.astype(float) - expected).max() <= 0.51


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # in the oracle, at the steepest sigmoid
@pytest.mark.parametrize("function", ["", "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("centre", "width"), [(2048, 1000), (100.5, 300), (4000, 4096), (2048, 2)])
def test_windows_are_those_of_the_standard(function, centre, width):
    ds = plain(RAMP12, WindowCenter=centre, WindowWidth=width)
    if function:
        ds.VOILUTFunction = function
    expected = apply_voi_lut(RAMP12, ds)
    low, high = (0, 4095)  # pydicom windows into the range of the stored bits
    assert close(to_plate(ds), (expected - low) / (high - low) * 255)


def test_the_first_window_counts():
    ds = plain(RAMP12, WindowCenter=[1000, 3000], WindowWidth=[500, 20])
    only = plain(RAMP12, WindowCenter=1000, WindowWidth=500)
    assert (to_plate(ds) == to_plate(only)).all()


def test_a_window_is_applied_after_the_rescale():
    ds = plain(RAMP12, RescaleSlope="2", RescaleIntercept="-1000", WindowCenter=1000, WindowWidth=2000)
    expected = np.clip((RAMP12 * 2.0 - 1000 - 999.5) / 1999 + 0.5, 0, 1) * 255
    assert close(to_plate(ds), expected)


def lut(first, data, bits=16):
    item = Dataset()
    item.add_new(0x00283002, "US", [len(data), first, bits])
    item.add_new(0x00283006, "OW", np.asarray(data, "<u2").tobytes())
    return Sequence([item])


def test_a_voi_lut_wins_over_a_window(tmp_path):
    table = (np.linspace(0, 1, 2000) ** 2 * 4095).astype(int)
    ds = plain(RAMP12, WindowCenter=10, WindowWidth=20, VOILUTSequence=lut(500, table, 12))
    expected = apply_voi_lut(RAMP12, ds, prefer_lut=True)
    assert close(to_plate(again(ds, tmp_path)), expected / 4095 * 255)


def test_a_modality_lut_comes_first(tmp_path):
    table = np.arange(4096)[::-1]
    ds = plain(RAMP12, ModalityLUTSequence=lut(0, table), WindowCenter=1000, WindowWidth=800)
    values = apply_modality_lut(RAMP12, ds)
    assert close(to_plate(again(ds, tmp_path)), np.clip((values - 999.5) / 799 + 0.5, 0, 1) * 255)


def test_a_lut_that_is_too_short_is_an_error():
    ds = plain(RAMP12, VOILUTSequence=lut(0, [1, 2, 3]))
    ds.VOILUTSequence[0].LUTDescriptor = [500, 0, 16]
    with pytest.raises(ValueError, match="LUTData"):
        to_plate(ds)


def test_without_a_window_the_percentiles_of_the_film_stretch():
    ds = plain(RAMP12)
    low, high = np.percentile(RAMP12, (0.5, 99.5))
    assert np.abs(to_plate(ds) - np.clip((RAMP12 - low) / (high - low), 0, 1) * 255).max() < 0.6


@pytest.mark.parametrize(("centre", "width"), [("", ""), ("2048", "0"), ("2048", "1"), ("9000", "100"), ("x", "y")])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_window_that_shows_nothing_or_is_broken_gives_way_to_percentiles(centre, width):
    ds = plain(RAMP12)
    ds.add_new(0x00281050, "LO", centre)
    ds.add_new(0x00281051, "LO", width)
    assert (to_plate(ds) == to_plate(plain(RAMP12))).all()


def test_monochrome1_comes_out_as_its_monochrome2():
    two = wrap(chest(128, 5), "P1")
    one = wrap(chest(128, 5), "P1", photometric="MONOCHROME1")
    assert (decode(one) == 255 - decode(two)).all()
    assert (to_plate(one) == to_plate(two)).all()


def test_inverse_shape_inverts_and_with_monochrome1_not_twice():
    two, inverse, both = plain(RAMP12), plain(RAMP12), plain(RAMP12)
    inverse.PresentationLUTShape = "INVERSE"
    both.PhotometricInterpretation, both.PresentationLUTShape = "MONOCHROME1", "INVERSE"
    assert (to_plate(inverse) == to_plate(both)).all()
    assert close(255 - to_plate(two).astype(int), to_plate(inverse).astype(int))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_does_not_count(photometric):
    pixels = RAMP12 // 2 + 1000
    pixels[:, :100] = 4095
    ds = plain(pixels, PixelPaddingValue=4095, PhotometricInterpretation=photometric)
    plate = to_plate(ds)
    assert (plate[:, :100] == 0).all()
    inner = pixels[:, 100:]
    low, high = np.percentile(inner, (0.5, 99.5))
    expected = np.clip((inner - low) / (high - low), 0, 1) * 255
    assert np.abs(plate[:, 100:] - (255 - expected if photometric == "MONOCHROME1" else expected)).max() < 1


def test_a_padding_range_is_padding_from_end_to_end():
    ds = plain(RAMP12, PixelPaddingValue=0, PixelPaddingRangeLimit=1000)
    assert (to_plate(ds)[RAMP12 <= 1000] == 0).all()


def test_signed_padding():
    values = (RAMP12.astype(np.int16) - 2048).copy()
    values[0] = -2000
    ds = plain(np.zeros((512, 512), np.uint16), bits=16, PixelRepresentation=1)
    ds.PixelData = values.tobytes()
    ds.add_new(0x00280120, "SS", -2000)
    assert (to_plate(ds)[0] == 0).all()


def test_nothing_but_padding_is_blank():
    ds = plain(np.full((64, 64), 7, np.uint8), PixelPaddingValue=7)
    with pytest.raises(Blank):
        to_plate(ds)


# Letterbox


def slow_area(values, out):
    """The area average of one line, by its definition: the integral of a step function over each interval."""
    size = len(values)
    fine = np.repeat(np.asarray(values, float), out)  # every interval border is now a sample border
    return fine.reshape(out, size).mean(1)


@pytest.mark.parametrize(("size", "out"), [(1955, 512), (513, 512), (1024, 512), (700, 482), (1841, 482), (5, 3)])
def test_shrinking_is_the_exact_area_average(size, out):
    values = np.random.default_rng(size).random(size)
    found = [float(weights @ values[start : start + len(weights)]) for start, weights in taps(size, out)]
    assert np.allclose(found, slow_area(values, out), atol=1e-6)


@pytest.mark.parametrize(("size", "out"), [(224, 512), (511, 512), (64, 512), (96, 480), (1, 4), (2, 7)])
def test_growing_is_bilinear_as_pillow_does_it(size, out):
    values = np.random.default_rng(size).random((size, 1)).astype(np.float32)
    expected = np.asarray(Picture.fromarray(values).resize((1, out), Picture.Resampling.BILINEAR))[:, 0]
    found = [float(weights @ values[start : start + len(weights), 0]) for start, weights in taps(size, out)]
    assert np.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(1955, 1841), (512, 512), (224, 224), (100, 300), (300, 64), (3000, 100)])
def test_the_aspect_is_kept_and_the_film_centred(shape):
    plate = letterbox(np.full(shape, 200.0, np.float32))
    rows, columns = np.nonzero(plate.any(1))[0], np.nonzero(plate.any(0))[0]
    height, width = len(rows), len(columns)
    assert max(height, width) == 512
    assert abs(height / width - shape[0] / shape[1]) / (shape[0] / shape[1]) < 0.03
    assert abs((511 - rows[-1]) - rows[0]) <= 1
    assert abs((511 - columns[-1]) - columns[0]) <= 1
    assert set(np.unique(plate)) <= {0, 200}


def test_a_film_of_the_plates_size_is_not_touched():
    values = np.random.default_rng(0).integers(0, 256, (512, 512)).astype(np.float32)
    assert (letterbox(values) == values).all()


def test_a_plate_is_the_same_every_time():
    ds = film(9, 700, 12)
    assert (to_plate(ds) == to_plate(ds)).all()
