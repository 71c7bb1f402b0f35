"""The inbox: a folder in which each file is either complete and durable, or absent.

Temporary file + fsync + rename + fsync of the folder. File names are random. Must not import DICOM modules or a ledger.
"""

import errno
import fcntl
import io
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from cxrloop.durable import sync_folder

BLOCK = 1 << 20  # bytes copied at once
MAX_PARTS = 1024  # IOV_MAX of Linux


class Incoming:
    """A file being received: write, then commit. Leaving the `with` block without commit removes it."""

    def __init__(self, inbox: "Inbox"):
        self._inbox = inbox
        self._temp = inbox.folder / ".tmp" / uuid.uuid4().hex
        self._file = self._temp.open("x+b", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX)  # `Inbox.sweep` skips locked files

    def write(self, *parts: bytes | memoryview) -> None:
        """Append the parts, if possible with one system call. Raises OSError, ENOSPC below the free-disk limit."""
        self._inbox.require_room(sum(len(part) for part in parts))
        remaining = [memoryview(part) for part in parts if len(part)]
        while remaining:
            written = os.writev(self._file.fileno(), remaining[:MAX_PARTS])
            while remaining and written >= len(remaining[0]):
                written -= len(remaining.pop(0))
            if remaining:
                remaining[0] = remaining[0][written:]

    def reader(self, offset: int) -> BinaryIO:
        """Return a read-only stream of the bytes written so far, from `offset` on. Closing it leaves the file open."""
        stream = io.BufferedReader(io.FileIO(self._file.fileno(), closefd=False), BLOCK >> 4)
        stream.seek(offset)
        return stream

    def commit(self) -> Path:
        """Return the final path after fsync, rename into the inbox and fsync of the folder. Raises OSError."""
        os.fsync(self._file.fileno())
        final = self._inbox.folder / f"{uuid.uuid4().hex}.dcm"
        self._temp.rename(final)
        try:
            sync_folder(self._inbox.folder)
        except OSError:
            final.unlink(missing_ok=True)  # it may not be durable, so it is neither acknowledged nor kept
            raise
        return final

    def __enter__(self) -> "Incoming":
        return self

    def __exit__(self, *raised: object) -> None:
        self._temp.unlink(missing_ok=True)
        self._file.close()


class Inbox:
    """The folder `folder`, created if missing. Accepts no file that would leave less than `min_free_bytes` of disk."""

    def __init__(self, folder: Path, min_free_bytes: int = 256 << 20):
        self.folder = Path(folder)
        self.min_free_bytes = min_free_bytes
        (self.folder / ".tmp").mkdir(parents=True, exist_ok=True)

    def begin(self, size: int = 0) -> Incoming:
        """Return a new incoming file of about `size` bytes. Raises OSError(ENOSPC) below the free-disk limit."""
        self.require_room(size)
        return Incoming(self)

    def require_room(self, size: int) -> None:
        """Raise OSError(ENOSPC) if `size` more bytes would leave less than `min_free_bytes` of disk."""
        disk = os.statvfs(self.folder)
        if disk.f_bavail * disk.f_frsize - size < self.min_free_bytes:
            raise OSError(errno.ENOSPC, f"less than {self.min_free_bytes >> 20} MiB would be free")

    def put(self, data: bytes) -> Path:
        """Store one file and return its path once it is durable. Raises OSError and then leaves nothing."""
        return self.put_parts([data])

    def put_parts(self, parts: Iterable[bytes | memoryview]) -> Path:
        """Store a file given in pieces, as `put` does, without joining them in memory."""
        parts = list(parts)
        with self.begin(sum(len(part) for part in parts)) as incoming:
            for part in parts:
                incoming.write(part)
            return incoming.commit()

    def put_file(self, source: Path) -> Path:
        """Store a copy of the file at `source`, as `put` does."""
        with source.open("rb") as stream, self.begin(source.stat().st_size) as incoming:
            while block := stream.read(BLOCK):
                incoming.write(block)
            return incoming.commit()

    def waiting(self, limit: int | None = None) -> list[Path]:
        """Return the files in the inbox, oldest first, at most `limit`."""
        with os.scandir(self.folder) as entries:
            by_time = sorted((_mtime(entry), entry.name) for entry in entries if entry.name.endswith(".dcm"))
        return [self.folder / name for _, name in by_time[:limit]]

    def sweep(self) -> int:
        """Remove incomplete files of dead writers and return how many. Files of running writers stay."""
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


def _mtime(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_mtime_ns
    except FileNotFoundError:  # removed by the intake since the folder was listed
        return 0
