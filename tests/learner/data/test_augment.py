"""Views and feeds: resizing and augmentation against PIL, and batches that are the same every time."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from learner.data import augment
from learner.data.feed import ImageFeed
from learner.networks import pooling
from learner.round.manifest import load
from learner.round.recipe import resolve
from tests.support.learner.round_folders import make_round

torch.set_num_threads(1)  # tiny tensors: a second thread only slows them down


@pytest.fixture
def images():
    return torch.from_numpy(np.random.default_rng(0).random((3, 48, 48), dtype=np.float32))


def pil(image, mode="F"):
    return Image.fromarray(image.numpy() if mode == "F" else (image * 255).round().byte().numpy())


@pytest.mark.parametrize("size", [32, 96, 224])
def test_resize_is_antialiased_bilinear_like_pil(size):
    plate = np.random.default_rng(1).integers(0, 256, (1, 512, 512), dtype=np.uint8)
    ours = augment.to_image(torch.from_numpy(plate), pooling.resize_matrix(512, size))[0, 0] * 255
    theirs = np.asarray(Image.fromarray(plate[0].astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR))
    torch.testing.assert_close(ours, torch.tensor(theirs), atol=2e-3, rtol=0)


def test_crop_is_antialiased_bicubic_like_pil(images):
    top, left, high, wide = (torch.tensor([float(v)]) for v in (5, 9, 30, 37))
    ours = augment.crop_matrix(top, high, 48, 24) @ images[:1] @ augment.crop_matrix(left, wide, 48, 24).transpose(1, 2)
    theirs = pil(images[0]).crop((9, 5, 46, 35)).resize((24, 24), Image.Resampling.BICUBIC)
    torch.testing.assert_close(ours[0], torch.tensor(np.asarray(theirs)), atol=1e-5, rtol=0)


def test_crops_lie_inside_the_image_with_the_drawn_area():
    numbers = torch.rand(500, augment.NUMBERS_PER_VIEW)
    top, left, high, wide = augment.crop_boxes(numbers, 96, (0.2, 0.6))
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + high <= 96).all()
    assert (left + wide <= 96).all()
    share = high * wide / 96**2
    assert 0.18 < share.min() < 0.25
    assert 0.55 < share.max() < 0.62


def test_equalise_equals_pil(images):
    images = images**2 * 0.7
    ours = (augment.equalise(images) * 255).round()
    for i, image in enumerate(images):
        assert np.array_equal(ours[i].numpy(), np.asarray(ImageOps.equalize(pil(image, "L"))))
    flat = torch.full((1, 8, 8), 0.4)
    assert torch.equal(augment.equalise(flat), flat)


def test_autocontrast_stretches_and_keeps_a_constant_image(images):
    out = augment.autocontrast(images * 0.3 + 0.2)
    assert out.min() == 0
    assert out.max() == 1
    flat = torch.full((1, 8, 8), 0.4)
    assert torch.equal(augment.autocontrast(flat), flat)


def test_blur_keeps_a_constant_image_and_the_mean_of_the_centre(images):
    flat = torch.full((2, 16, 16), 0.4)
    torch.testing.assert_close(augment.blur(flat, torch.tensor([0.1, 2.0])), flat)
    torch.testing.assert_close(augment.blur(images, torch.full((3,), 0.01)), images)
    assert augment.blur(images, torch.full((3,), 2.0)).std() < 0.3 * images.std()


def test_rotation_by_a_quarter_is_exact(images):
    torch.testing.assert_close(
        augment.rotate(images, torch.full((3,), 90.0)), images.rot90(1, (1, 2)), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(augment.rotate(images, torch.zeros(3)), images, atol=1e-5, rtol=0)


def test_first_view_is_unaugmented_and_views_are_mirrored_only_with_flip():
    still = {"rotate": 0, "global_noise": 0, "global_scale": [1, 1], "mean": 0, "std": 1}
    recipe = resolve("distl", "demo", {**still, "image_size": 96, "local_size": 48})
    images = torch.rand(2, 1, 96, 96)
    numbers = torch.zeros(2, 3, augment.NUMBERS_PER_VIEW)  # flip number 0 is below any probability
    numbers[..., augment.TRIES : 2 * augment.TRIES] = 0.5  # square crops
    made = augment.make_views(images, numbers, recipe)
    assert [tuple(v.shape[1:]) for v in made] == [(1, 96, 96), (1, 96, 96), (1, 48, 48), (1, 48, 48)]
    assert torch.equal(made[0], images)
    torch.testing.assert_close(made[1], images, atol=1e-5, rtol=0)
    mirrored = augment.make_views(images, numbers, recipe.override({"flip": True}))
    torch.testing.assert_close(mirrored[1], images.flip(-1), atol=1e-5, rtol=0)


def test_a_batch_is_the_same_in_any_order_and_in_parts(tmp_path):
    round_ = load(make_round(tmp_path / "r"))

    def feed():
        return ImageFeed(round_.unlabelled, round_.recipe, torch.device("cpu"), "unlabelled", fixed_order=False)

    first, again = feed(), feed()
    batches = [first.batch(0, i).views(slice(0, 4)) for i in range(first.batches)]
    last = again.batch(0, first.batches - 1)
    for whole, low, high in zip(batches[-1], last.views(slice(0, 2)), last.views(slice(2, 4)), strict=True):
        torch.testing.assert_close(whole, torch.cat([low, high]), atol=1e-6, rtol=0)
    other = first.batch(1, 0).views(slice(0, 4))
    assert not torch.equal(other[1], batches[0][1])


def test_labelled_epochs_have_all_images_and_unlabelled_ones_drop_the_short_batch(tmp_path):
    round_ = load(make_round(tmp_path / "r", train=(6, 9)))
    labelled = ImageFeed(round_.labelled, round_.recipe, torch.device("cpu"), "labelled", fixed_order=True)
    assert sorted(np.concatenate(labelled.order(0))) == list(range(6))
    assert [list(o) for o in labelled.order(0)] == [list(o) for o in labelled.order(5)]
    unlabelled = ImageFeed(round_.unlabelled, round_.recipe, torch.device("cpu"), "unlabelled", fixed_order=False)
    assert [len(o) for o in unlabelled.order(0)] == [4, 4, 4]


def test_batched_views_equal_those_of_single_images_and_operations(images):
    recipe = resolve(
        "distl", "demo", {"image_size": 48, "local_size": 24, "local_views": 5, "global_noise": 0.5, "flip": True}
    )
    numbers = torch.from_numpy(np.random.default_rng(4).random((3, 6, augment.NUMBERS_PER_VIEW), dtype=np.float32))
    together = augment.make_views(images[:, None], numbers, recipe)
    assert len(together) == 7
    chances = [(recipe.global_noise, recipe.global_scale, 48)] + [(recipe.local_noise, recipe.local_scale, 24)] * 5
    for number, (chance, scale, size) in enumerate(chances):
        for sample in range(3):
            drawn = numbers[sample : sample + 1, number]
            flip, angle, auto, equal, blurred, sigma = drawn[0, 2 * augment.TRIES + 2 :].tolist()
            top, left, high, wide = augment.crop_boxes(drawn, 48, scale)
            down, across = augment.crop_matrix(top, high, 48, size), augment.crop_matrix(left, wide, 48, size)
            alone = (down @ images[sample] @ across.transpose(1, 2)).clamp(0, 1)
            alone = alone.flip(-1) if flip < 0.5 else alone
            alone = augment.rotate(alone, torch.tensor([(2 * angle - 1) * recipe.rotate]))
            alone = augment.autocontrast(alone) if auto < chance else alone
            alone = augment.equalise(alone) if equal < chance else alone
            alone = augment.blur(alone, torch.tensor([0.1 + 1.9 * sigma])) if blurred < chance else alone
            apart = (together[1 + number][sample] - (alone - recipe.mean) / recipe.std).abs()
            # equalise rounds to 256 levels: a value between two levels may become either
            assert (apart > 1e-4).float().mean() < 0.01


def opposite(images, chosen, change, real=augment.apply_where):
    return real(images, ~chosen, change)


MUTATIONS = [
    ("test_batched_views_equal_those_of_single_images_and_operations", "apply_where", opposite),
    ("test_batched_views_equal_those_of_single_images_and_operations", "apply_where", lambda images, *_: images),
    ("test_batched_views_equal_those_of_single_images_and_operations", "BLUR", (0.1, 1.0)),
    ("test_resize_is_antialiased_bilinear_like_pil", "resize_matrix", lambda old, new, real=pooling.resize_matrix: real(old, new).round()),
    ("test_crop_is_antialiased_bicubic_like_pil", "crop_matrix", lambda a, b, c, d, real=augment.crop_matrix: real(a + 1, b, c, d)),
    ("test_crops_lie_inside_the_image_with_the_drawn_area", "ASPECT", (-3.0, 3.0)),
    ("test_equalise_equals_pil", "equalise", lambda images: images),
    ("test_autocontrast_stretches_and_keeps_a_constant_image", "autocontrast", lambda images: images.clamp(0, 1)),
    ("test_blur_keeps_a_constant_image_and_the_mean_of_the_centre", "blur", lambda images, sigma: images),
    ("test_rotation_by_a_quarter_is_exact", "rotate", lambda images, degrees, real=augment.rotate: real(images, -degrees)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "attribute", "wrong"), MUTATIONS)
def test_every_property_notices_its_mutation(name, attribute, wrong, images, monkeypatch):
    monkeypatch.setattr(augment if hasattr(augment, attribute) else pooling, attribute, wrong)
    test = globals()[name]
    available = {"images": images, "size": 96}
    with pytest.raises(AssertionError):
        test(**{key: available[key] for key in inspect.signature(test).parameters})
