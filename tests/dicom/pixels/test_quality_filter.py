"""The quality filter: chest, upright, not inverted, not empty; by pixels, whatever the tags."""

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from scipy.signal import correlate2d

from agent.images import intake, listing
from dicom.intake.examine import Admission, examine
from dicom.phantom import phantom
from dicom.phantom.wrap import wrap
from dicom.pixels import quality_filter
from dicom.pixels.plate import to_plate
from tests.conftest import make_site
from tests.support.agent.images import put
from tests.support.dicom.pacs import KEY, save

WITH_FILTER, WITHOUT_FILTER = Admission(quality=True), Admission()
TURNS = {90: "rotated by 90 degrees", 180: "rotated by 180 degrees", 270: "rotated by 270 degrees"}


def sample(name):
    return dcmread(get_testdata_file(name, download=False))


@pytest.fixture(scope="module")
def chest():
    """Return the plate of a real chest image."""
    return to_plate(sample("RG1_UNCR.dcm"))


def tagged_as_chest(ds):
    ds.BodyPartExamined, ds.ViewPosition, ds.PatientOrientation = "CHEST", "PA", ["L", "F"]
    return ds


def plate_of(image):
    return to_plate(wrap(image, "P1"))


def test_a_real_chest_image_passes(chest):
    assert quality_filter.fault(chest) is None
    prediction = quality_filter.predict(chest)
    assert prediction.chest > 0.9 and prediction.inverted < 0.1 and prediction.turned[0] > 0.9


@pytest.mark.parametrize("degrees", TURNS)
def test_a_rotated_chest_image_is_rejected_with_its_angle(chest, degrees):
    assert TURNS[degrees] in quality_filter.fault(np.rot90(chest, degrees // 90))


def test_an_inverted_chest_image_is_rejected_and_not_corrected(chest):
    assert "inverted" in quality_filter.fault(255 - chest)


@pytest.mark.parametrize("shape", [(512, 360), (380, 512)])
def test_a_letterbox_does_not_matter(chest, shape):
    boxed = np.zeros((512, 512), np.uint8)
    top, left = (512 - shape[0]) // 2, (512 - shape[1]) // 2
    boxed[top : top + shape[0], left : left + shape[1]] = chest[(512 - shape[0]) // 2 :, (512 - shape[1]) // 2 :][
        : shape[0], : shape[1]
    ]
    assert quality_filter.fault(boxed) is None
    inside = boxed[top : top + shape[0], left : left + shape[1]]
    inside[:] = 255 - inside
    assert "inverted" in quality_filter.fault(boxed)


@pytest.mark.parametrize("name", ["RG3_UNCR.dcm", "CT_small.dcm", "MR_small.dcm"])
def test_an_image_that_is_not_a_chest_is_rejected_whatever_its_tags(name):
    assert "quality: not a chest image" in quality_filter.fault(to_plate(tagged_as_chest(sample(name))))


def test_a_tibia_tagged_as_chest_is_rejected_and_a_chest_without_tags_is_admitted(tmp_path):
    tibia = save(tagged_as_chest(sample("RG3_UNCR.dcm")), tmp_path / "tibia.dcm")
    result = examine(tibia, KEY, WITH_FILTER)
    assert result.outcome == "rejected"
    assert result.reason.startswith("quality: not a chest image (")
    assert result.plate is None
    assert examine(tibia, KEY, WITHOUT_FILTER).outcome == "admitted"
    ds = sample("RG1_UNCR.dcm")
    ds.BodyPartExamined = ""
    assert examine(save(ds, tmp_path / "chest.dcm"), KEY, WITH_FILTER).outcome == "admitted"


def test_a_chest_with_unknown_view_stays_rejected_by_its_header(tmp_path):
    ds = sample("RG1_UNCR.dcm")
    ds.ViewPosition = ""
    ds.pop("PatientOrientation", None)
    result = examine(save(ds, tmp_path / "image.dcm"), KEY, WITH_FILTER)
    assert (result.outcome, result.reason.split(":")[0]) == ("rejected", "view unknown")


def test_an_image_with_the_wrong_monochrome_is_rejected_as_inverted(tmp_path):
    ds = sample("RG1_UNCR.dcm")
    assert ds.PhotometricInterpretation == "MONOCHROME1"
    ds.PhotometricInterpretation = "MONOCHROME2"
    result = examine(save(ds, tmp_path / "image.dcm"), KEY, WITH_FILTER)
    assert result.outcome == "rejected"
    assert "quality: inverted" in result.reason


def test_phantoms_pass_and_rotated_or_inverted_phantoms_do_not():
    for image in phantom.draw(24, 17):
        pixels = image.pixels(96)
        assert quality_filter.fault(plate_of(pixels)) is None
        assert quality_filter.fault(plate_of(phantom.TOP - pixels)) is not None
        assert quality_filter.fault(plate_of(np.rot90(pixels, 1 + image.seed % 3))) is not None


def test_an_empty_or_saturated_image_is_rejected(chest):
    rng = np.random.default_rng(0)
    assert "saturated" in quality_filter.fault(np.where(chest > 120, 255, 0).astype(np.uint8))
    assert "saturated" in quality_filter.fault(np.zeros((512, 512), np.uint8))
    assert "noise" in quality_filter.fault(rng.integers(60, 200, (512, 512), dtype=np.uint8))
    for side in (16, 32, 64):
        patches = np.kron(rng.integers(60, 200, (side, side)), np.ones((512 // side, 512 // side)))
        assert quality_filter.fault(patches.astype(np.uint8)) is not None


def test_black_borders_do_not_count_as_clipped(chest):
    boxed = np.zeros((512, 512), np.uint8)
    boxed[:, 200:312] = chest[:, 200:312]
    assert quality_filter.clipped(boxed) < 0.3


def test_the_net_equals_a_second_implementation(chest):
    """Compare with scipy's correlation, layer by layer, with the shipped weights."""
    with np.load(quality_filter.WEIGHTS) as file:
        net = {name: file[name].astype(np.float64) for name in file.files}
    small = np.array([[chest[r : r + 16, c : c + 16].mean() for c in range(0, 512, 16)] for r in range(0, 512, 16)])
    maps = [(small - small.mean()) / (small.std() + 8)]
    for layer in range(4):
        step, weights = 1 if layer == 0 else 2, net[f"w{layer}"]
        maps = [
            np.maximum(
                sum(correlate2d(m, k, "same") for m, k in zip(maps, kernels, strict=True))[::step, ::step] + bias, 0
            )
            for kernels, bias in zip(weights, net[f"b{layer}"], strict=True)
        ]
    logits = net["w4"] @ np.concatenate([m.ravel() for m in maps]) + net["b4"]
    prediction = quality_filter.predict(chest)
    assert np.allclose((prediction.chest, prediction.inverted), 1 / (1 + np.exp(-logits[:2])), atol=1e-4)
    assert np.allclose(prediction.turned, np.exp(logits[2:]) / np.exp(logits[2:]).sum(), atol=1e-4)
    assert quality_filter.WEIGHTS.stat().st_size < 1 << 20


def test_the_site_keeps_a_rejected_image_and_shows_the_reason(tmp_path):
    for filtered, state in ((True, "rejected"), (False, "stored")):
        site = make_site(tmp_path / state, admission={"quality": filtered})
        put(site, tagged_as_chest(sample("RG3_UNCR.dcm")))
        with site.ledger() as ledger, intake.examiner(site) as pool:
            assert intake.step(site, ledger, pool) == 1
            (row,) = listing.newest(site, ledger, None, 10)
            kept = ledger.value("SELECT original FROM image")
        assert row["state"] == state
        assert site.store.path(kept).is_file()
        assert (row["reason"] or "").startswith("quality: not a chest image (" if filtered else "")
