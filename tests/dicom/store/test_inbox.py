"""The inbox: each file is complete and durable, or absent."""

import errno
import fcntl
import os
import resource
import threading
from pathlib import Path

import pytest

from dicom.store.inbox import Inbox


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_put_returns_a_whole_file_under_a_random_name(tmp_path):
    inbox = Inbox(tmp_path, 0)
    first, second = inbox.put(b"image one"), inbox.put(b"image one")
    assert first != second
    assert first.read_bytes() == second.read_bytes() == b"image one"
    assert len(first.stem) == 32
    assert first.suffix == ".dcm"
    assert names(tmp_path) == sorted([first.name, second.name])


def test_every_byte_is_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    inbox, steps = Inbox(tmp_path, 0), []
    fsync, rename = os.fsync, Path.rename

    def seen_fsync(handle):
        steps.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")  # noqa: PTH112
        fsync(handle)

    def seen_rename(source, target):
        steps.append("rename")
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(Path, "rename", seen_rename)
    inbox.put(b"image")
    assert steps == ["file", "rename", "folder"]


def test_put_fails_below_the_free_disk_limit(tmp_path):
    inbox = Inbox(tmp_path, 1 << 60)
    with pytest.raises(OSError) as raised:
        inbox.put(b"image")
    assert raised.value.errno == errno.ENOSPC
    assert names(tmp_path) == []
    inbox.min_free_bytes = 0
    assert inbox.put(b"image").exists()


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path):
    inbox = Inbox(tmp_path, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError):
            inbox.put(b"x" * 300_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []
    assert inbox.put(b"x" * 300_000).stat().st_size == 300_000


def test_leaving_without_commit_leaves_nothing(tmp_path):
    inbox = Inbox(tmp_path, 0)
    with inbox.begin(10) as incoming:
        incoming.write(b"half a fi")
    assert names(tmp_path) == []


def test_waiting_is_oldest_first_and_limited(tmp_path):
    inbox = Inbox(tmp_path, 0)
    paths = [inbox.put(str(n).encode()) for n in range(5)]
    for age, path in enumerate(paths):
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    assert inbox.waiting() == paths[::-1]
    assert inbox.waiting(2) == [paths[4], paths[3]]


def test_temporary_files_are_not_listed_and_are_removed(tmp_path):
    inbox = Inbox(tmp_path, 0)
    (tmp_path / ".tmp" / "left").write_bytes(b"half")
    assert inbox.waiting() == []
    assert inbox.sweep() == 1
    assert names(tmp_path) == []


def test_the_sweep_skips_the_file_of_a_running_writer(tmp_path):
    inbox = Inbox(tmp_path, 0)
    with inbox.begin() as incoming:
        incoming.write(b"image")
        assert Inbox(tmp_path, 0).sweep() == 0
        assert incoming.commit().read_bytes() == b"image"


def test_the_temporary_file_of_a_dead_writer_is_removed(tmp_path):
    inbox, temp = Inbox(tmp_path, 0), tmp_path / ".tmp" / "dead"
    with temp.open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert inbox.sweep() == 0
    assert inbox.sweep() == 1


def test_many_writers_at_once_lose_nothing(tmp_path):
    inbox = Inbox(tmp_path, 0)
    threads = [
        threading.Thread(target=lambda n=n: [inbox.put(f"{n} {m}".encode()) for m in range(20)]) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    contents = {path.read_text() for path in inbox.waiting()}
    assert contents == {f"{n} {m}" for n in range(4) for m in range(20)}


def test_put_file_copies_and_leaves_the_source(tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(b"y" * 3_000_000)
    inbox = Inbox(tmp_path / "inbox", 0)
    assert inbox.put_file(source).read_bytes() == source.read_bytes()
    assert source.exists()
