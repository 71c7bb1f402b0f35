"""The pixel path: stored values, brightness, letterbox; each step against a second implementation."""

import numpy as np
import pytest
from PIL import Image as Picture
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence

from dicom.errors import BlankImage
from dicom.phantom.wrap import wrap
from dicom.pixels.letterbox import letterbox, taps
from dicom.pixels.plate import decode, to_plate
from tests.support.dicom.encoded_images import written_and_read
from tests.support.dicom.pacs import chest, xray

# From stored values to brightness


def plain(pixels, **values):
    ds = wrap(pixels, "P1", bits=values.pop("bits", None))
    del ds.WindowCenter, ds.WindowWidth
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return ds


RAMP = np.arange(512 * 512, dtype=np.uint32).reshape(512, 512)
RAMP12 = (RAMP // 64).astype(np.uint16)  # every 12-bit value 64 times, in the size of a plate: no resampling


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
    low, high = (0, 4095)  # pydicom maps the window to the range of the stored bits
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


def test_a_voi_lut_has_priority_over_a_window(tmp_path):
    table = (np.linspace(0, 1, 2000) ** 2 * 4095).astype(int)
    ds = plain(RAMP12, WindowCenter=10, WindowWidth=20, VOILUTSequence=lut(500, table, 12))
    expected = apply_voi_lut(RAMP12, ds, prefer_lut=True)
    assert close(to_plate(written_and_read(ds, tmp_path)), expected / 4095 * 255)


def test_white_is_the_top_of_the_voi_lut_and_not_the_brightest_pixel_of_the_image(tmp_path):
    dim = RAMP12 // 4
    ds = plain(dim, VOILUTSequence=lut(0, np.arange(4096), 12))
    assert close(to_plate(written_and_read(ds, tmp_path)), dim / 4095 * 255)


def test_a_modality_lut_comes_first(tmp_path):
    table = np.arange(4096)[::-1]
    ds = plain(RAMP12, ModalityLUTSequence=lut(0, table), WindowCenter=1000, WindowWidth=800)
    values = apply_modality_lut(RAMP12, ds)
    assert close(to_plate(written_and_read(ds, tmp_path)), np.clip((values - 999.5) / 799 + 0.5, 0, 1) * 255)


def test_a_lut_that_is_too_short_is_an_error():
    ds = plain(RAMP12, VOILUTSequence=lut(0, [1, 2, 3]))
    ds.VOILUTSequence[0].LUTDescriptor = [500, 0, 16]
    with pytest.raises(ValueError, match="LUTData"):
        to_plate(ds)


def test_without_a_window_the_percentiles_of_the_image_stretch():
    ds = plain(RAMP12)
    low, high = np.percentile(RAMP12, (0.5, 99.5))
    assert np.abs(to_plate(ds) - np.clip((RAMP12 - low) / (high - low), 0, 1) * 255).max() < 0.6


@pytest.mark.parametrize(("centre", "width"), [("", ""), ("2048", "0"), ("2048", "1"), ("9000", "100"), ("x", "y")])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_empty_or_invalid_window_is_replaced_by_percentiles(centre, width):
    ds = plain(RAMP12)
    ds.add_new(0x00281050, "LO", centre)
    ds.add_new(0x00281051, "LO", width)
    assert (to_plate(ds) == to_plate(plain(RAMP12))).all()


def test_monochrome1_comes_out_as_its_monochrome2():
    normal = wrap(chest(128, 5), "P1")
    inverted = wrap(chest(128, 5), "P1", photometric="MONOCHROME1")
    assert (decode(inverted) == 255 - decode(normal)).all()
    assert (to_plate(inverted) == to_plate(normal)).all()


def test_inverse_shape_and_monochrome1_together_invert_once():
    normal, inverse, both = plain(RAMP12), plain(RAMP12), plain(RAMP12)
    inverse.PresentationLUTShape = "INVERSE"
    both.PhotometricInterpretation, both.PresentationLUTShape = "MONOCHROME1", "INVERSE"
    assert (to_plate(inverse) == to_plate(both)).all()
    assert close(255 - to_plate(normal).astype(int), to_plate(inverse).astype(int))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_excluded_from_the_percentiles(photometric):
    pixels = RAMP12 // 2 + 1000
    pixels[:, :100] = 4095
    ds = plain(pixels, PixelPaddingValue=4095, PhotometricInterpretation=photometric)
    plate = to_plate(ds)
    assert (plate[:, :100] == 0).all()
    inner = pixels[:, 100:]
    low, high = np.percentile(inner, (0.5, 99.5))
    expected = np.clip((inner - low) / (high - low), 0, 1) * 255
    assert np.abs(plate[:, 100:] - (255 - expected if photometric == "MONOCHROME1" else expected)).max() < 1


def test_a_padding_range_includes_both_ends():
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
    with pytest.raises(BlankImage):
        to_plate(ds)


def test_overlays_are_not_burnt_into_the_plate(tmp_path):
    bare, drawn, old = plain(RAMP12), plain(RAMP12), plain(RAMP12)
    ones = b"\xff" * (512 * 512 // 8)
    for group in (0x6000, 0x601E):
        drawn.add_new((group, 0x0010), "US", 512)
        drawn.add_new((group, 0x0011), "US", 512)
        drawn.add_new((group, 0x0040), "CS", "G")
        drawn.add_new((group, 0x0100), "US", 1)
        drawn.add_new((group, 0x3000), "OW", ones)
    old.add_new((0x6000, 0x0100), "US", 16)  # in the bits above the stored ones, as in images before 2004
    old.add_new((0x6000, 0x0102), "US", 12)
    old.PixelData = (RAMP12 | np.uint16(0xF000)).tobytes()
    for ds in (drawn, old):
        assert (to_plate(written_and_read(ds, tmp_path)) == to_plate(bare)).all()


@pytest.mark.parametrize(("function", "width"), [("LINEAR_EXACT", 0.5), ("SIGMOID", 0.5), ("LINEAR_EXACT", 1)])
def test_a_window_narrower_than_1_is_valid_for_small_rescaled_values(function, width):
    ds = plain(RAMP12, RescaleSlope=str(1 / 4096), WindowCenter="0.5", WindowWidth=str(width), VOILUTFunction=function)
    distance = (RAMP12 * float(ds.RescaleSlope) - 0.5) / width
    expected = np.clip(distance + 0.5, 0, 1) if function == "LINEAR_EXACT" else 1 / (1 + np.exp(-4 * distance))
    assert close(to_plate(ds), expected * 255)


@pytest.mark.parametrize("name", ["explicit", "implicit"])
def test_a_voi_lut_over_rescaled_values_begins_below_zero(tmp_path, name):
    table = (np.linspace(0, 1, 4096) ** 2 * 65535).astype(int)
    syntax = {"explicit": "1.2.840.10008.1.2.1", "implicit": "1.2.840.10008.1.2"}[name]
    ds = wrap(RAMP12, "P1", bits=12, transfer_syntax=syntax)
    del ds.WindowCenter, ds.WindowWidth
    ds.RescaleSlope, ds.RescaleIntercept, ds.VOILUTSequence = "1", "-1024", lut(0, table)
    ds.VOILUTSequence[0].add_new(0x00283002, "SS", [4096, -1024, 16])
    assert close(to_plate(written_and_read(ds, tmp_path)), table[RAMP12] / 65535 * 255)


def test_a_signed_image_has_a_signed_first_entry(tmp_path):
    values = (RAMP12.astype(np.int32) - 2048).astype(np.int16)
    table = np.arange(4096)[::-1]
    ds = plain(np.zeros((512, 512), np.uint16), bits=16, PixelRepresentation=1, ModalityLUTSequence=lut(0, table))
    ds.PixelData = values.tobytes()
    ds.ModalityLUTSequence[0].add_new(0x00283002, "SS", [4096, -2048, 16])
    ds.WindowCenter, ds.WindowWidth = 2048, 4096
    assert close(to_plate(written_and_read(ds, tmp_path)), np.clip((table[RAMP12] - 2047.5) / 4095 + 0.5, 0, 1) * 255)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"])
def test_eight_bit_lut_entries_are_packed_two_in_a_word(tmp_path, syntax):
    table = (np.linspace(0, 1, 4096) ** 2 * 255).astype(np.uint8)
    ds = wrap(RAMP12, "P1", bits=12, transfer_syntax=syntax)
    del ds.WindowCenter, ds.WindowWidth
    packed = table.view("<u2").byteswap() if syntax.endswith(".2.2") else table
    item = lut(0, [0], 8)
    item[0].add_new(0x00283002, "US", [4096, 0, 8])
    item[0].add_new(0x00283006, "OW", packed.tobytes())
    ds.VOILUTSequence = item
    assert close(to_plate(written_and_read(ds, tmp_path)), table[RAMP12].astype(float))


def test_values_outside_a_lut_map_to_its_ends(tmp_path):
    ds = plain(RAMP12, VOILUTSequence=lut(1000, np.arange(100, 2100)))
    expected = np.clip(RAMP12.astype(int) - 1000, 0, 1999) + 100
    assert close(to_plate(written_and_read(ds, tmp_path)), expected / 2099 * 255)


def test_real_look_up_tables_are_read_as_pydicom_reads_them():
    ds = dcmread(get_testdata_file("vlut_04.dcm", download=False))
    assert close(to_plate(ds), apply_voi_lut(ds.pixel_array, ds) / 65535 * 255)
    ds = dcmread(get_testdata_file("mlut_18.dcm", download=False))  # signed, no window: the image's own range
    values = apply_modality_lut(ds.pixel_array, ds).astype(float)
    low, high = np.quantile(values, (0.005, 0.995), method="inverted_cdf")
    assert close(to_plate(ds), np.clip((values - low) / (high - low), 0, 1) * 255)


# Letterbox


def slow_area(values, out):
    """Return the area average of one line by definition: the integral of a step function over each interval."""
    size = len(values)
    fine = np.repeat(np.asarray(values, float), out)  # every interval border is now a sample border
    return fine.reshape(out, size).mean(1)


@pytest.mark.parametrize(("size", "out"), [(1955, 512), (513, 512), (1024, 512), (700, 482), (1841, 482), (5, 3)])
def test_shrinking_is_the_exact_area_average(size, out):
    values = np.random.default_rng(size).random(size)
    values_out = [float(weights @ values[start : start + len(weights)]) for start, weights in taps(size, out)]
    assert np.allclose(values_out, slow_area(values, out), atol=1e-6)


@pytest.mark.parametrize(("size", "out"), [(224, 512), (511, 512), (64, 512), (96, 480), (1, 4), (2, 7)])
def test_growing_is_bilinear_as_pillow_does_it(size, out):
    values = np.random.default_rng(size).random((size, 1)).astype(np.float32)
    expected = np.asarray(Picture.fromarray(values).resize((1, out), Picture.Resampling.BILINEAR))[:, 0]
    values_out = [float(weights @ values[start : start + len(weights), 0]) for start, weights in taps(size, out)]
    assert np.allclose(values_out, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(1955, 1841), (512, 512), (224, 224), (100, 300), (300, 64), (3000, 100)])
def test_the_aspect_is_kept_and_the_image_centred(shape):
    plate = letterbox(np.full(shape, 200.0, np.float32))
    rows, columns = np.nonzero(plate.any(1))[0], np.nonzero(plate.any(0))[0]
    height, width = len(rows), len(columns)
    assert max(height, width) == 512
    assert abs(height / width - shape[0] / shape[1]) / (shape[0] / shape[1]) < 0.03
    assert abs((511 - rows[-1]) - rows[0]) <= 1
    assert abs((511 - columns[-1]) - columns[0]) <= 1
    assert set(np.unique(plate)) <= {0, 200}


def test_an_image_of_the_size_of_a_plate_is_unchanged():
    values = np.random.default_rng(0).integers(0, 256, (512, 512)).astype(np.float32)
    assert (letterbox(values) == values).all()


def test_a_plate_is_the_same_every_time():
    ds = xray(9, 700, 12)
    assert (to_plate(ds) == to_plate(ds)).all()
