"""The inbox: a folder in which a file either is whole and on disk, or is not.

Temp + fsync + rename + directory fsync. Names are random; knows no DICOM, no sender and no ledger.
"""

import errno
import fcntl
import io
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

BLOCK = 1 << 20
MOST_PARTS = 1024  # IOV_MAX of Linux


def sync_folder(folder: Path) -> None:
    """fsync the directory, so that a rename or link in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Incoming:
    """One file on its way in: write, then commit; leaving the `with` block without commit leaves nothing."""

    def __init__(self, inbox: "Inbox"):
        self._inbox = inbox
        self._temp = inbox.folder / ".tmp" / uuid.uuid4().hex
        self._file = self._temp.open("x+b", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX)  # a sweep leaves alone what a living writer holds

    def write(self, *parts: bytes | memoryview) -> None:
        """Append the parts, in one call to the kernel where it takes them all. Raises OSError, also when disk is short."""
        self._inbox.require_room(sum(len(part) for part in parts))
        left = [memoryview(part) for part in parts if len(part)]
        while left:
            written = os.writev(self._file.fileno(), left[:MOST_PARTS])
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if left:
                left[0] = left[0][written:]

    def reader(self, offset: int) -> BinaryIO:
        """What was written so far, from `offset` on; for reading only, and closed apart from the file."""
        stream = io.BufferedReader(io.FileIO(self._file.fileno(), closefd=False), BLOCK >> 4)
        stream.seek(offset)
        return stream

    def commit(self) -> Path:
        """fsync, rename into the inbox, fsync the folder; only now is the file in. Raises OSError."""
        os.fsync(self._file.fileno())
        final = self._inbox.folder / f"{uuid.uuid4().hex}.dcm"
        self._temp.rename(final)
        try:
            sync_folder(self._inbox.folder)
        except OSError:
            final.unlink(missing_ok=True)  # not known to be durable, so not acknowledged, so not kept
            raise
        return final

    def __enter__(self) -> "Incoming":
        return self

    def __exit__(self, *raised: object) -> None:
        self._temp.unlink(missing_ok=True)
        self._file.close()


class Inbox:
    """The folder `folder`, made when missing. Below `min_free_bytes` of free disk nothing more comes in."""

    def __init__(self, folder: Path, min_free_bytes: int = 256 << 20):
        self.folder = Path(folder)
        self.min_free_bytes = min_free_bytes
        (self.folder / ".tmp").mkdir(parents=True, exist_ok=True)

    def begin(self, size: int = 0) -> Incoming:
        """A new incoming file of about `size` bytes. Raises OSError(ENOSPC) when too little disk would be left."""
        self.require_room(size)
        return Incoming(self)

    def require_room(self, size: int) -> None:
        """Raises OSError(ENOSPC) when `size` bytes more would leave less than `min_free_bytes` of disk."""
        room = os.statvfs(self.folder)
        if room.f_bavail * room.f_frsize - size < self.min_free_bytes:
            raise OSError(errno.ENOSPC, f"less than {self.min_free_bytes >> 20} MiB would be free")

    def put(self, data: bytes) -> Path:
        """Take in one file; returns its path once it is durable. Raises OSError, leaving nothing."""
        return self.put_parts([data])

    def put_parts(self, parts: Iterable[bytes | memoryview]) -> Path:
        """As `put`, for a file in pieces, without joining them in memory."""
        parts = list(parts)
        with self.begin(sum(len(part) for part in parts)) as incoming:
            for part in parts:
                incoming.write(part)
            return incoming.commit()

    def put_file(self, source: Path) -> Path:
        """As `put`, a copy of the file at `source`."""
        with source.open("rb") as stream, self.begin(source.stat().st_size) as incoming:
            while block := stream.read(BLOCK):
                incoming.write(block)
            return incoming.commit()

    def waiting(self, limit: int | None = None) -> list[Path]:
        """Files in the inbox, oldest first, at most `limit`."""
        with os.scandir(self.folder) as entries:
            found = [(_age(entry), entry.name) for entry in entries if entry.name.endswith(".dcm")]
        return [self.folder / name for _, name in sorted(found)[:limit]]

    def sweep(self) -> int:
        """Remove what a writer that died left half written; returns how many. Living writers are left alone."""
        removed = 0
        for temp in (self.folder / ".tmp").iterdir():
            try:
                with temp.open("rb") as stream:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    temp.unlink()
                    removed += 1
            except (BlockingIOError, FileNotFoundError):
                continue
        return removed


def _age(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_mtime_ns
    except FileNotFoundError:  # taken by the intake between listing and looking
        return 0
