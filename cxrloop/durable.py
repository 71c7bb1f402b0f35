"""Files and folders that are written whole or not at all, and JSON files.

Whole: written under a temporary name, fsynced, renamed, and the folder fsynced. Must not import any other package.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODE = 0o644  # of new files, less the process's umask


def sync_folder(folder: Path) -> None:
    """Make new and renamed files in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, chunks: bytes | Iterable[bytes], mode: int = MODE) -> None:
    """Write a new file and fsync it; not atomic by itself. Raises FileExistsError."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as out:
        for chunk in [chunks] if isinstance(chunks, bytes) else chunks:
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())


def write_atomic(path: Path, data: bytes, mode: int = MODE) -> None:
    """Write or replace `path`, whole or not at all; durable when this returns. Raises OSError and removes the temporary.

    The temporary is `.NAME.tmp` beside it, so the next write removes what a killed process left. Only one process at a
    time may write a path.
    """
    temp = path.with_name(f".{path.name}.tmp")
    temp.unlink(missing_ok=True)
    try:
        write_synced(temp, data, mode)
        temp.replace(path)
    except OSError:
        temp.unlink(missing_ok=True)  # a half-written file would keep a full disk full
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; empty where there is no such file. Raises ValueError for anything but JSON."""
    return json.loads(path.read_text()) if path.exists() else {}


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends without an exception, else is removed.

    Removes first what a killed process left of an earlier one. Files only, no folders inside.
    """
    temp = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir()
    try:
        yield temp
        for path in temp.iterdir():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        temp.replace(target)
    finally:
        shutil.rmtree(temp, ignore_errors=True)  # gone already after the rename
    sync_folder(target.parent)
