"""Atomic, durable files: temporary file + fsync + rename + fsync of the folder."""

import os
import uuid
from collections.abc import Iterable
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Fsync `folder`, so that the names in it survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, chunks: bytes | Iterable[bytes], mode: int = 0o644) -> None:
    """Write a new file and fsync it; raises FileExistsError. Not atomic: a crash can leave a part of the file."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as out:
        for chunk in [chunks] if isinstance(chunks, bytes) else chunks:
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())


def replace_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write or replace `path` atomically; durable when this returns."""
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write_synced(temp, data, mode)
        temp.replace(path)
    except OSError:
        temp.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
