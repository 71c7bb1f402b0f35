"""The store: content-addressed, written once, durable."""

import os
import time

import numpy as np
import pytest

from dicom.store.store import Store

SHA = "ab" + "0" * 62


def test_an_original_is_kept_under_its_hash_and_once(tmp_path):
    source = tmp_path / "inbox.dcm"
    source.write_bytes(b"image")
    store = Store(tmp_path / "store")
    relative = store.keep_original(source, SHA)
    assert relative == f"originals/ab/{SHA}.dcm"
    assert store.path(relative).read_bytes() == b"image"
    assert store.keep_original(source, SHA) == relative
    source.unlink()
    assert store.path(relative).read_bytes() == b"image"


def test_a_file_of_the_site_is_linked_and_a_foreign_one_copied(tmp_path):
    site, foreign = tmp_path / "site", tmp_path / "foreign.dcm"
    store = Store(site / "store")
    own = site / "own.dcm"
    own.write_bytes(b"own")
    foreign.write_bytes(b"foreign")
    linked = store.path(store.keep_original(own, "11" * 32))
    copied = store.path(store.keep_original(foreign, "22" * 32))
    assert linked.samefile(own)
    assert not copied.samefile(foreign)
    foreign.write_bytes(b"changed later")
    assert copied.read_bytes() == b"foreign"


def test_rejected_and_quarantined_files_have_their_own_folder(tmp_path):
    source = tmp_path / "inbox.dcm"
    source.write_bytes(b"not an image")
    store = Store(tmp_path / "store")
    assert store.keep_aside(source, SHA) == f"aside/ab/{SHA}.dcm"
    assert not list((store.folder / "originals").rglob("*.dcm"))


def test_a_plate_is_read_back_unchanged(tmp_path):
    store = Store(tmp_path / "store")
    plate = np.random.default_rng(0).integers(0, 256, (512, 512), dtype=np.uint8)
    relative = store.keep_plate(plate, SHA)
    assert relative == f"plates/ab/{SHA}.npy"
    assert (store.plate(relative) == plate).all()
    assert (np.load(store.plates_folder / "ab" / f"{SHA}.npy") == plate).all()
    before = store.path(relative).stat().st_mtime_ns
    assert store.keep_plate(plate, SHA) == relative
    assert store.path(relative).stat().st_mtime_ns == before


@pytest.mark.parametrize("sha", ["", "../../etc", "AB" * 32, "ab/" + "0" * 61])
def test_only_a_hash_makes_a_path(tmp_path, sha):
    source = tmp_path / "inbox.dcm"
    source.write_bytes(b"image")
    store = Store(tmp_path / "store")
    with pytest.raises(ValueError):
        store.keep_original(source, sha)


@pytest.mark.parametrize("relative", ["../secret.npy", "/etc/passwd", f"plates/ab/../{SHA}.npy", ""])
def test_only_a_path_of_the_store_is_read(tmp_path, relative):
    with pytest.raises(ValueError):
        Store(tmp_path).plate(relative)


def test_old_temporary_files_are_removed_and_new_ones_stay(tmp_path, monkeypatch):
    store, temp = Store(tmp_path), tmp_path / "originals" / ".tmp-dead"
    temp.write_bytes(b"half")
    assert store.sweep() == 0
    assert temp.exists()
    later = time.time() + 3700
    monkeypatch.setattr(time, "time", lambda: later)
    assert store.sweep() == 1
    assert not temp.exists()


def test_a_failed_write_leaves_nothing(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(FileNotFoundError):
        store.keep_original(tmp_path / "gone.dcm", SHA)
    assert not [name for _, _, names in os.walk(tmp_path) for name in names]
