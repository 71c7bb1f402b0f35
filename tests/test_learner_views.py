"""Views and feeds: the resize, the noise against PIL, and the promise that a batch can be made again."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from learner.data import Films
from learner.recipe import resolve
from learner.round_dir import load
from learner.views import (
    NUMBERS,
    TRIES,
    autocontrast,
    blur,
    crop_boxes,
    crop_matrix,
    equalise,
    make_views,
    resize_matrix,
    rotate,
    to_image,
)
from tests.learner_site import make_round

torch.set_num_threads(1)  # tiny tensors: a second thread only waits


@pytest.fixture
def images():
    return torch.from_numpy(np.random.default_rng(0).random((3, 48, 48), dtype=np.float32))


def pil(image, mode="F"):
    return Image.fromarray(image.numpy() if mode == "F" else (image * 255).round().byte().numpy())


@pytest.mark.parametrize("size", [32, 96, 224])
def test_resize_is_antialiased_bilinear_like_pil(size):
    plate = np.random.default_rng(1).integers(0, 256, (1, 512, 512), dtype=np.uint8)
    ours = to_image(torch.from_numpy(plate), resize_matrix(512, size))[0, 0] * 255
    theirs = np.asarray(Image.fromarray(plate[0].astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR))
    torch.testing.assert_close(ours, torch.tensor(theirs), atol=2e-3, rtol=0)


def test_crop_is_antialiased_bicubic_like_pil(images):
    top, left, high, wide = (torch.tensor([float(v)]) for v in (5, 9, 30, 37))
    ours = crop_matrix(top, high, 48, 24) @ images[:1] @ crop_matrix(left, wide, 48, 24).transpose(1, 2)
    theirs = pil(images[0]).crop((9, 5, 46, 35)).resize((24, 24), Image.Resampling.BICUBIC)
    torch.testing.assert_close(ours[0], torch.tensor(np.asarray(theirs)), atol=1e-5, rtol=0)


def test_crops_stay_inside_and_keep_their_share_of_the_film():
    numbers = torch.rand(500, NUMBERS)
    top, left, high, wide = crop_boxes(numbers, 96, (0.2, 0.6))
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + high <= 96).all()
    assert (left + wide <= 96).all()
    share = high * wide / 96**2
    assert 0.18 < share.min() < 0.25
    assert 0.55 < share.max() < 0.62


def test_equalise_is_pils(images):
    images = images**2 * 0.7
    ours = (equalise(images) * 255).round()
    for i, image in enumerate(images):
        assert np.array_equal(ours[i].numpy(), np.asarray(ImageOps.equalize(pil(image, "L"))))
    flat = torch.full((1, 8, 8), 0.4)
    assert torch.equal(equalise(flat), flat)


def test_autocontrast_stretches_and_leaves_a_flat_film(images):
    out = autocontrast(images * 0.3 + 0.2)
    assert out.min() == 0
    assert out.max() == 1
    flat = torch.full((1, 8, 8), 0.4)
    assert torch.equal(autocontrast(flat), flat)


def test_blur_keeps_a_flat_film_and_the_mean_of_the_middle(images):
    flat = torch.full((2, 16, 16), 0.4)
    torch.testing.assert_close(blur(flat, torch.tensor([0.1, 2.0])), flat)
    torch.testing.assert_close(blur(images, torch.full((3,), 0.01)), images)
    assert blur(images, torch.full((3,), 2.0)).std() < 0.3 * images.std()


def test_rotation_by_a_quarter_is_exact(images):
    torch.testing.assert_close(rotate(images, torch.full((3,), 90.0)), images.rot90(1, (1, 2)), atol=1e-5, rtol=0)
    torch.testing.assert_close(rotate(images, torch.zeros(3)), images, atol=1e-5, rtol=0)


def test_first_view_is_the_film_and_nothing_is_mirrored_unless_asked():
    still = {"rotate": 0, "global_noise": 0, "global_scale": [1, 1], "mean": 0, "std": 1}
    recipe = resolve("distl", "demo", {**still, "image_size": 96, "local_size": 48})
    images = torch.rand(2, 1, 96, 96)
    numbers = torch.zeros(2, 3, NUMBERS)  # flip number 0 is below any chance
    numbers[..., TRIES : 2 * TRIES] = 0.5  # square crops
    views = make_views(images, numbers, recipe)
    assert [tuple(v.shape[1:]) for v in views] == [(1, 96, 96), (1, 96, 96), (1, 48, 48), (1, 48, 48)]
    assert torch.equal(views[0], images)
    torch.testing.assert_close(views[1], images, atol=1e-5, rtol=0)
    mirrored = make_views(images, numbers, recipe.override({"flip": True}))
    torch.testing.assert_close(mirrored[1], images.flip(-1), atol=1e-5, rtol=0)


def test_a_batch_can_be_made_again_in_any_order_and_in_parts(tmp_path):
    round_ = load(make_round(tmp_path / "r"))

    def feed():
        return Films(round_.unlabelled, round_.recipe, torch.device("cpu"), "unlabelled", fixed_order=False)

    first, again = feed(), feed()
    batches = [first.batch(0, i).views(slice(0, 4)) for i in range(first.batches)]
    last = again.batch(0, first.batches - 1)
    for whole, low, high in zip(batches[-1], last.views(slice(0, 2)), last.views(slice(2, 4)), strict=True):
        torch.testing.assert_close(whole, torch.cat([low, high]), atol=1e-6, rtol=0)
    other = first.batch(1, 0).views(slice(0, 4))
    assert not torch.equal(other[1], batches[0][1])


def test_labelled_passes_keep_every_film_and_unlabelled_ones_drop_the_short_batch(tmp_path):
    round_ = load(make_round(tmp_path / "r", train=(6, 9)))
    labelled = Films(round_.labelled, round_.recipe, torch.device("cpu"), "labelled", fixed_order=True)
    assert sorted(np.concatenate(labelled.order(0))) == list(range(6))
    assert [list(o) for o in labelled.order(0)] == [list(o) for o in labelled.order(5)]
    unlabelled = Films(round_.unlabelled, round_.recipe, torch.device("cpu"), "unlabelled", fixed_order=False)
    assert [len(o) for o in unlabelled.order(0)] == [4, 4, 4]
