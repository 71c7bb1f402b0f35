"""Simple features of plates, and linear heads on them that explain their answers."""

import pytest
import torch

from learner.errors import LearnerError
from learner.evaluation import pixel_baseline
from learner.fits.patch_dictionary import CENTROIDS, contrast_normalised, learn_patches
from learner.networks.blend import Blend, Part, feature_names, grey_levels, read_blend
from learner.networks.simple_features import CONTRAST, PATCH, SIDES, STRIDES, Patches, Pixels, whitened_patches

torch.set_num_threads(1)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def grey():
    """Four images with structure at all scales, in [0, 1]."""
    coarse = torch.rand(4, 1, 16, 16, generator=draw())
    smooth = torch.nn.functional.interpolate(coarse, size=(512, 512), mode="bicubic")[:, 0]
    return (smooth + 0.05 * torch.randn(4, 512, 512, generator=draw(1))).clamp(0, 1)


@pytest.fixture(scope="module")
def learnt(grey):
    return {size: learn_patches(torch.nn.functional.avg_pool2d(grey[:, None], 512 // size)[:, 0], 3) for size in (64,)}


def test_pixel_features_are_close_to_the_thumbnails_of_the_raw_pixel_baseline(grey):
    thumbnails = torch.from_numpy(pixel_baseline.thumbnails((grey * 255).round().byte().numpy())).float() / 255
    assert (Pixels()(grey) - thumbnails).abs().max() < 0.03


def test_whitened_patches_follow_the_published_steps_on_each_patch(grey):
    images = grey[:2, ::8, ::8].contiguous()
    patches = learn_patches(images, 0)
    white = whitened_patches(images, STRIDES[64], patches.whiten, patches.offset)
    cut = images[:, 10 : 10 + PATCH, 20 : 20 + PATCH].flatten(1)  # the patch at position (5, 10) with stride 2
    expected = contrast_normalised(cut) @ patches.whiten - patches.offset
    torch.testing.assert_close(white[:, :, 5, 10], expected, rtol=1e-3, atol=1e-3)


def test_an_activation_is_what_a_centroid_is_closer_than_the_mean_distance(grey, learnt):
    patches = learnt[64]
    images = patches.matrix @ grey @ patches.matrix.T
    white = whitened_patches(images, STRIDES[64], patches.whiten, patches.offset)
    distance = torch.cdist(white[0, :, 3, 4][None], patches.centroids)[0]
    expected = (distance.mean() - distance).clamp(min=0)
    torch.testing.assert_close(patches.activations(images)[0, :, 3, 4], expected, rtol=1e-3, atol=1e-3)


def test_patch_features_of_an_image_and_its_mirror_image_are_the_same(grey, learnt):
    torch.testing.assert_close(learnt[64](grey), learnt[64](grey.flip(-1)), rtol=1e-3, atol=1e-4)


def test_the_same_images_and_seed_give_the_same_centroids(grey, learnt):
    again = learn_patches(torch.nn.functional.avg_pool2d(grey[:, None], 8)[:, 0], 3)
    assert torch.equal(again.centroids, learnt[64].centroids)
    assert again.centroids.shape == (CENTROIDS, PATCH * PATCH)


def test_a_uniform_image_gives_finite_features():
    flat = torch.full((2, 64, 64), 0.5)
    assert learn_patches(flat, 0).activations(flat).isfinite().all()
    assert CONTRAST > 0


@pytest.mark.parametrize("name", ["pixels", "patches64"])
def test_the_heatmap_of_a_part_adds_up_to_its_logits(name, grey, learnt):
    features = Pixels() if name == "pixels" else learnt[64]
    seen = features(grey)
    part = Part(features, torch.randn(3, seen.shape[1], generator=draw()), seen.mean(0))
    part.set_grid(16)
    maps = part.contributions(grey)
    assert maps.shape == (4, 3, 16, 16)
    torch.testing.assert_close(maps.sum((2, 3)), part(grey), rtol=1e-3, atol=1e-3)


def test_a_blend_is_read_back_from_its_tensors(grey, learnt):
    parts = {}
    for name, features in (("pixels", Pixels()), ("patches64", learnt[64])):
        seen = features(grey)
        parts[name] = Part(features, torch.randn(2, seen.shape[1], generator=draw()), seen.mean(0))
    blend = Blend(torch.tensor([0.5, 0.2]), torch.tensor([-1.0, 1.0]), parts)
    again = read_blend({**blend.tensors(), "swa.weight": torch.zeros(1)})
    network = torch.randn(4, 2, generator=draw(2))
    assert torch.equal(again(grey, network), blend(grey, network))
    assert set(again.parts) <= set(feature_names())


def test_without_its_tensors_there_is_no_blend():
    assert read_blend({"swa.weight": torch.zeros(1)}) is None


def test_grey_levels_are_the_bytes_of_a_plate_over_255():
    plates = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    assert grey_levels(plates).tolist() == [[[0.0, 1.0]]]


def test_patches_of_every_known_side_can_be_read_and_the_learnt_ones_are_among_them():
    assert set(SIDES) <= set(STRIDES)
    for side in STRIDES:
        patches = Patches(side, torch.eye(PATCH**2), torch.zeros(PATCH**2), torch.randn(3, PATCH**2))
        assert patches(torch.rand(2, 512, 512)).shape == (2, 48)


def test_a_blend_with_unknown_features_is_refused_and_not_read_without_them():
    tensors = {
        "blend.scale": torch.ones(1),
        "blend.bias": torch.zeros(1),
        "blend.parts.patches77.weight": torch.ones(1, 4),
    }
    with pytest.raises(LearnerError, match="unknown simple features patches77"):
        read_blend(tensors)
