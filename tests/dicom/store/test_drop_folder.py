"""The drop folder: complete files move into the inbox, incomplete ones wait."""

import os
import shutil
import time

import pytest

from dicom.store.drop_folder import DropFolder
from dicom.store.inbox import Inbox
from tests.support.dicom.pacs import save, wait_for, xray


@pytest.fixture
def drop(tmp_path):
    folder = tmp_path / "drop"
    folder.mkdir()
    return folder, Inbox(tmp_path / "inbox", 0)


def old(path, seconds=5):
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def test_a_complete_file_moves_in(drop):
    folder, inbox = drop
    path = old(save(xray(), folder / "image.dcm"))
    data = path.read_bytes()
    assert DropFolder(folder, inbox).rescan() == 1
    assert not path.exists()
    assert inbox.waiting()[0].read_bytes() == data


def test_files_in_folders_move_in_too(drop):
    folder, inbox = drop
    (folder / "patient" / "study").mkdir(parents=True)
    old(save(xray(), folder / "patient" / "study" / "1"))
    assert DropFolder(folder, inbox).rescan() == 1


def test_a_file_that_is_still_being_written_waits(drop):
    folder, inbox = drop
    watched = DropFolder(folder, inbox)
    path = folder / "image.dcm"
    path.write_bytes(b"half")
    assert watched.rescan() == 0
    path.write_bytes(b"half and more")
    assert watched.rescan() == 0
    old(path)
    assert watched.rescan() == 1


def test_a_clock_that_is_ahead_does_not_delay_files(drop):
    folder, inbox = drop
    watched = DropFolder(folder, inbox)
    path = folder / "image.dcm"
    path.write_bytes(b"whole")
    os.utime(path, (time.time() + 86400,) * 2)
    assert watched.rescan() == 0
    assert wait_for(watched.rescan, 3)


@pytest.mark.parametrize("name", [".hidden.dcm", "image.dcm.part", "image.tmp", "image.dcm~", ".sync/image.dcm"])
def test_names_of_unfinished_transfers_are_skipped(drop, name):
    folder, inbox = drop
    (folder / name).parent.mkdir(exist_ok=True)
    old(save(xray(), folder / name))
    assert DropFolder(folder, inbox).rescan() == 0


def test_links_are_not_followed(drop, tmp_path):
    folder, inbox = drop
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (folder / "image.dcm").symlink_to(old(secret))
    assert DropFolder(folder, inbox).rescan() == 0
    assert secret.exists()


def test_with_too_little_disk_the_file_stays_until_there_is_room(drop):
    folder, inbox = drop
    path = old(save(xray(), folder / "image.dcm"))
    inbox.min_free_bytes = 1 << 60
    watched = DropFolder(folder, inbox)
    assert watched.rescan() == 0
    assert path.exists()
    inbox.min_free_bytes = 0
    assert watched.rescan() == 1


def test_a_running_drop_folder_moves_copied_and_renamed_files(drop, tmp_path):
    folder, inbox = drop
    source = save(xray(), tmp_path / "image.dcm")
    old(save(xray(7), folder / "before.dcm"))
    watched = DropFolder(folder, inbox)
    watched.start()
    try:
        assert wait_for(lambda: len(inbox.waiting()) == 1)
        shutil.copyfile(source, folder / "copied.dcm")
        source.rename(folder / "renamed.dcm")
        assert wait_for(lambda: len(inbox.waiting()) == 3)
    finally:
        watched.stop()
    assert not list(folder.iterdir())
