"""Packed plates: pixels as in serving, packed once, again after changes, whole or not at all, removed at the end."""

import inspect
import os
import shutil
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.data import feed, packed_plates
from learner.data.feed import ImageFeed
from learner.data.plates import read_plates
from learner.errors import ManifestError, Paused
from learner.networks.pooling import resize_matrix
from learner.round.manifest import load
from learner.training.run import Run
from tests.support.learner.round_folders import make_round

torch.set_num_threads(1)  # tiny tensors: a second thread only slows them down

SIZE = 32
Disk = namedtuple("Disk", "total used free")


@pytest.fixture
def round_(tmp_path):
    return load(make_round(tmp_path / "r"))


def served(samples):
    """Return plates resized as in serving, as a plain sum in float64."""
    rows = resize_matrix(512, SIZE).double()
    return torch.einsum("sx,bxy,ty->bst", rows, read_plates(samples).double() / 255, rows).float()[:, None]


def feed_of(round_, packed=None, labels=None):
    cpu = torch.device("cpu")
    return ImageFeed(round_.unlabelled, round_.recipe, cpu, "unlabelled", False, labels=labels, packed=packed)


def test_packed_pixels_differ_from_serving_by_at_most_half_a_level(round_):
    samples = round_.unlabelled
    packed = packed_plates.open_packed_plates(round_.folder, samples, SIZE)
    backwards = samples[::-1]
    theirs = served(backwards)
    ours = packed.images(packed.read(backwards))
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1 / 131070 + 3e-7  # half a level, and float32
    # the errors of the other formats, as documented in the module
    assert 1.5e-3 < ((theirs * 255).round() / 255 - theirs).abs().max() < 2.0e-3
    assert 1e-4 < (theirs.half().float() - theirs).abs().max() < 2.5e-4


def test_black_and_white_survive_packing_exactly():
    ends = torch.tensor([0.0, 1.0, -1e-7, 1 + 1e-7]).view(1, 1, 2, 2)
    levels = packed_plates.to_levels(ends)
    assert levels.flatten().tolist() == [-32768, 32767, -32768, 32767]
    assert torch.equal(packed_plates.PackedPlates.images(None, levels), ends.clamp(0, 1))  # pyright: ignore[reportArgumentType]


def test_views_of_packed_plates_equal_views_of_plates(round_):
    packed = packed_plates.open_packed_plates(round_.folder, round_.unlabelled, SIZE)
    still = replace(round_, recipe=round_.recipe.override({"global_noise": 0, "local_noise": 0}))  # no equalised steps
    mine, theirs = feed_of(still, packed), feed_of(still)
    for index in range(mine.batches):
        both = zip(*(f.batch(1, index).views(slice(0, 4)) for f in (mine, theirs)), strict=True)
        for a, b in both:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_a_restarted_round_uses_its_packed_plates(round_):
    packed_plates.open_packed_plates(round_.folder, round_.unlabelled, SIZE)
    os.utime(round_.folder / "shard" / "levels.i16", ns=(5, 5))
    packed_plates.open_packed_plates(round_.folder, round_.unlabelled, SIZE)
    assert (round_.folder / "shard" / "levels.i16").stat().st_mtime_ns == 5


def test_plates_are_packed_again_for_a_changed_plate_order_or_size(round_):
    samples = round_.unlabelled
    keys = {
        packed_plates.key_of(samples, SIZE),
        packed_plates.key_of(samples[::-1], SIZE),
        packed_plates.key_of(samples, 16),
    }
    packed_plates.open_packed_plates(round_.folder, samples, SIZE)
    np.save(samples[3].plate, np.full((512, 512), 77, np.uint8))
    os.utime(samples[3].plate, ns=(1, 1))
    keys.add(packed_plates.key_of(samples, SIZE))
    assert len(keys) == 4
    packed = packed_plates.open_packed_plates(round_.folder, samples, SIZE)
    torch.testing.assert_close(packed.images(packed.read(samples[3:4])), torch.full((1, 1, SIZE, SIZE), 77 / 255))
    small = packed_plates.open_packed_plates(round_.folder, samples, 16)
    assert small.read(samples[:2]).shape == (2, 16, 16)


def test_a_crash_while_packing_leaves_no_folder_and_the_next_start_packs(round_):
    samples = round_.unlabelled
    lost = samples[-1].plate
    kept = lost.read_bytes()
    lost.write_bytes(kept[:1000])
    with pytest.raises(ManifestError, match="not a plate"):
        packed_plates.open_packed_plates(round_.folder, samples, SIZE)
    assert not (round_.folder / "shard").exists()
    lost.write_bytes(kept)
    packed = packed_plates.open_packed_plates(round_.folder, samples, SIZE)
    assert packed.levels.shape == (len(samples), SIZE, SIZE)
    assert sorted(p.name for p in (round_.folder / "shard").iterdir()) == ["key.json", "levels.i16"]


@pytest.mark.parametrize("damage", ["levels cut", "levels gone", "note cut", "note of another version"])
def test_damaged_packed_plates_are_packed_again(round_, damage):
    samples, folder = round_.unlabelled, round_.folder / "shard"
    whole = packed_plates.open_packed_plates(round_.folder, samples, SIZE).read(samples)
    what, how = damage.split(" ", 1)
    file = folder / {"levels": "levels.i16", "note": "key.json"}[what]
    if how == "gone":
        file.unlink()
    elif how == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.write_text('"abc"')
    assert torch.equal(packed_plates.open_packed_plates(round_.folder, samples, SIZE).read(samples), whole)


def test_the_error_for_a_missing_plate_names_it(round_):
    round_.unlabelled[0].plate.unlink()
    with pytest.raises(ManifestError, match=round_.unlabelled[0].plate.name):
        packed_plates.open_packed_plates(round_.folder, round_.unlabelled, SIZE)


def test_on_a_full_disk_plates_are_read_one_by_one_with_a_warning(round_, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Disk(10**6, 10**6 - 10**4, 10**4))
    with pytest.warns(UserWarning, match="free twice the space"):
        packed = packed_plates.open_packed_plates(round_.folder, round_.unlabelled, SIZE)
    assert packed is None
    assert not (round_.folder / "shard").exists()


def test_a_finished_round_has_no_packed_plates(round_):
    packed_plates.open_packed_plates(round_.folder, round_.unlabelled, SIZE)
    packed_plates.remove_packed_plates(round_.folder)
    packed_plates.remove_packed_plates(round_.folder)
    assert not (round_.folder / "shard").exists()


def test_a_feed_uses_a_table_of_labels_in_place_of_those_of_the_samples(round_):
    table = torch.arange(2.0 * len(round_.unlabelled)).view(-1, 2)
    mine = feed_of(round_, labels=table)
    for index, chosen in enumerate(mine.order(0)):
        assert torch.equal(mine.batch(0, index).labels, table[chosen])


def test_the_images_of_an_epoch_are_shuffled_once(round_, monkeypatch):
    made = []
    monkeypatch.setattr(
        ImageFeed,
        "_make_order",
        lambda self, epoch, real=ImageFeed._make_order: made.append(epoch) or real(self, epoch),
    )
    mine = feed_of(round_)
    for epoch in (0, 1, 2):
        for index in range(mine.batches):
            mine.batch(epoch, index)
    assert made == [0, 1, 2, 3]


MUTATIONS = [  # test, object, attribute, replacement
    (test_packed_pixels_differ_from_serving_by_at_most_half_a_level, packed_plates, "LEVELS", 255),
    (test_packed_pixels_differ_from_serving_by_at_most_half_a_level, packed_plates.augment, "to_image", lambda p, m: (m @ p.sqrt() @ m.T)[:, None] / 16),
    (test_packed_pixels_differ_from_serving_by_at_most_half_a_level, packed_plates, "to_levels", lambda x: (x[:, 0] * 65535).sub(32768).to(torch.int16)),
    (test_black_and_white_survive_packing_exactly, packed_plates, "to_levels", lambda x: (x[:, 0] * 65536).round().sub(32768).to(torch.int16)),
    (test_views_of_packed_plates_equal_views_of_plates, packed_plates.PackedPlates, "images", lambda self, x: x.float()[:, None] / 65535),
    (test_a_restarted_round_uses_its_packed_plates, packed_plates.cache_key, "matches", lambda folder, key: False),
    (test_plates_are_packed_again_for_a_changed_plate_order_or_size, packed_plates.cache_key, "matches", lambda folder, key: folder.exists()),
    (test_plates_are_packed_again_for_a_changed_plate_order_or_size, packed_plates, "key_of", lambda samples, size: f"{len(samples)} {size}"),
    (test_a_finished_round_has_no_packed_plates, packed_plates, "remove_packed_plates", lambda folder: None),
    (test_a_feed_uses_a_table_of_labels_in_place_of_those_of_the_samples, feed.torch, "from_numpy", lambda x, real=torch.from_numpy: real(x).roll(1, 0)),
    (test_the_images_of_an_epoch_are_shuffled_once, ImageFeed, "order", lambda self, epoch: self._make_order(epoch)),
]  # fmt: skip


@pytest.mark.parametrize("case", MUTATIONS, ids=lambda case: f"{case[0].__name__}-{case[2]}")
def test_every_property_notices_its_mutation(case, round_, monkeypatch):
    test, where, what, instead = case
    monkeypatch.setattr(where, what, instead)
    available = {"round_": round_, "monkeypatch": monkeypatch}
    with pytest.raises(AssertionError):
        test(**{name: available[name] for name in inspect.signature(test).parameters})


def test_the_end_of_the_window_interrupts_packing(tmp_path, monkeypatch):
    folder = make_round(tmp_path / "r", until="2020-01-01T05:00:00+00:00")
    monkeypatch.setattr(packed_plates, "REPORT_S", 0)
    run = Run(load(folder))
    with pytest.raises(Paused, match="the window ended"):
        run.unlabelled_feed()
    run.progress.close()
    assert not (folder / "shard").exists()
