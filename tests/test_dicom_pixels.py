"""The pixel path: stored values, brightness, letterbox; each step against a second implementation."""

import numpy as np
import pytest
from pacs import chest, film, save
from PIL import Image as Picture
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence

from dicom.pixels import Blank, decode, to_plate
from dicom.resize import letterbox, taps
from dicom.wrap import wrap


def again(ds, tmp_path):
    """The film written and read back, as it would come from a PACS."""
    return dcmread(save(ds, tmp_path / "again.dcm"))


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
