"""The site's files under the hash of their content: originals, plates, and rejected or quarantined files.

Every file is written once and durable; writing it again does nothing. Paths are relative to the store's folder.
Must not import DICOM modules or a ledger.
"""

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cxrloop import npy
from cxrloop.durable import sync_folder

MAX_WRITE_S = 3600  # seconds; the writer of an older temporary file is dead


class Store:
    """The folder `folder`, created if missing."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.plates_folder = self.folder / "plates"
        for part in ("originals", "aside", "plates"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        self.sweep()

    def keep_original(self, path: Path, sha256: str) -> str:
        """Store the file at `path` as an original and return "originals/ab/<sha256>.dcm". Raises OSError."""
        return self._keep_file("originals", path, sha256)

    def keep_aside(self, path: Path, sha256: str) -> str:
        """Store a rejected or quarantined file and return "aside/ab/<sha256>.dcm". Raises OSError."""
        return self._keep_file("aside", path, sha256)

    def keep_plate(self, plate: np.ndarray, sha256: str) -> str:
        """Store a uint8 [512, 512] plate and return "plates/ab/<sha256>.npy". Raises OSError."""

        def write(temp: Path) -> None:
            with temp.open("xb") as stream:
                np.save(stream, plate, allow_pickle=False)
            _sync_file(temp)

        return self._keep("plates", sha256, "npy", write)

    def plate(self, relative: str) -> np.ndarray:
        """Return the plate at a path that `keep_plate` returned. Raises FileNotFoundError, ValueError."""
        return npy.load(self.path(relative))

    def path(self, relative: str) -> Path:
        """Return the full path for a relative path of this store. Raises ValueError for any other path."""
        if not re.fullmatch(r"(originals|aside|plates)/[0-9a-f]{2}/[0-9a-f]{64}\.(dcm|npy)", relative):
            raise ValueError(f"{relative!r} is not a path of the store")
        return self.folder / relative

    def sweep(self) -> int:
        """Remove temporary files older than an hour, left by a crash, and return how many. Newer ones may be in use."""
        removed = 0
        for temp in self.folder.glob("*/.tmp-*"):
            try:
                if time.time() - temp.stat().st_ctime > MAX_WRITE_S:
                    temp.unlink()
                    removed += 1
            except FileNotFoundError:  # completed, or removed by another process
                continue
        return removed

    def _keep_file(self, part: str, path: Path, sha256: str) -> str:
        def write(temp: Path) -> None:
            # link files of the site; copy all others, because somebody may change them later
            if path.resolve().is_relative_to(self.folder.resolve().parent):
                try:
                    os.link(path, temp)
                except OSError as error:
                    if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                        raise
            if not temp.exists():
                shutil.copyfile(path, temp)
            _sync_file(temp)

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


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
