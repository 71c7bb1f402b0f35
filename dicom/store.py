"""The site's files: originals and plates under the hash of their content, and what was set aside.

Write once, durable, idempotent. Knows no DICOM and no ledger; the paths it gives out are relative to its folder.
"""

import errno
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dicom.inbox import BLOCK, sync_folder


class Store:
    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.plates_folder = self.folder / "plates"
        for part in ("originals", "aside", "plates"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        self.sweep()

    def keep_original(self, path: Path, sha256: str) -> str:
        """Keep the file at `path` as an original; returns "originals/ab/<sha256>.dcm". Raises OSError."""
        return self._keep_file("originals", path, sha256)

    def keep_aside(self, path: Path, sha256: str) -> str:
        """Keep the file at `path` as rejected or quarantined; returns "aside/ab/<sha256>.dcm". Raises OSError."""
        return self._keep_file("aside", path, sha256)

    def keep_plate(self, plate: np.ndarray, sha256: str) -> str:
        """Keep a uint8 [512, 512] plate; returns "plates/ab/<sha256>.npy". Raises OSError."""

        def write(temp: Path) -> None:
            with temp.open("xb") as stream:
                np.save(stream, plate, allow_pickle=False)
                stream.flush()
                os.fsync(stream.fileno())

        return self._keep("plates", sha256, "npy", write)

    def plate(self, relative: str) -> np.ndarray:
        """The plate at a path that `keep_plate` gave. Raises FileNotFoundError, ValueError."""
        return np.load(self.path(relative), allow_pickle=False)

    def path(self, relative: str) -> Path:
        """The file at a path that this store gave. Raises ValueError for any other path."""
        if not re.fullmatch(r"(originals|aside|plates)/[0-9a-f]{2}/[0-9a-f]{64}\.(dcm|npy)", relative):
            raise ValueError(f"{relative!r} is not a path of the store")
        return self.folder / relative

    def sweep(self) -> int:
        """Remove what a crash left half written; returns how many."""
        left = list(self.folder.glob("*/.tmp-*"))
        for temp in left:
            temp.unlink(missing_ok=True)
        return len(left)

    def _keep_file(self, part: str, path: Path, sha256: str) -> str:
        def write(temp: Path) -> None:
            try:
                os.link(path, temp)  # the inbox has fsynced the bytes; a second name costs nothing
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                    raise
                _copy(path, temp)

        return self._keep(part, sha256, "dcm", write)

    def _keep(self, part: str, sha256: str, kind: str, write: Callable[[Path], None]) -> str:
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise ValueError("sha256 must be 64 hex digits")
        relative = f"{part}/{sha256[:2]}/{sha256}.{kind}"
        final = self.folder / relative
        if final.exists():
            return relative
        if not final.parent.exists():
            final.parent.mkdir(exist_ok=True)
            sync_folder(final.parent.parent)
        temp = self.folder / part / f".tmp-{uuid.uuid4().hex}"
        try:
            write(temp)
            temp.rename(final)
        finally:
            temp.unlink(missing_ok=True)
        sync_folder(final.parent)
        return relative


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("xb") as written:
        while block := read.read(BLOCK):
            written.write(block)
        written.flush()
        os.fsync(written.fileno())
