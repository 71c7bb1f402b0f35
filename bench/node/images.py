"""The two sets that bench/node/ingest.py sends: real radiographs of pydicom-data with new UIDs, plain and compressed."""

from __future__ import annotations

from pathlib import Path

from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid

PLAIN = ("RG1_UNCR.dcm", "RG3_UNCR.dcm")  # 7.2 and 6.2 MB
COMPRESSED = ("RG1_J2KR.dcm", "RG3_J2KR.dcm")  # 4.3 and 0.8 MB, JPEG 2000 lossless


def uncompressed(folder: Path, count: int) -> list[Path]:
    """Write `count` uncompressed images with different UIDs; return their paths."""
    return _copies(folder / "uncompressed", PLAIN, count)


def compressed(folder: Path, count: int) -> list[Path]:
    """Write `count` JPEG 2000 images with different UIDs; return their paths."""
    return _copies(folder / "compressed", COMPRESSED, count)


def _copies(folder: Path, names: tuple[str, ...], count: int) -> list[Path]:
    folder.mkdir()
    paths = []
    images = [dcmread(str(get_testdata_file(name))) for name in names]
    for n in range(count):
        image = images[(n + n // 4 + n // 8) % len(images)]  # so that each of 1, 4 or 8 senders gets both images
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        path = folder / f"{n:03d}.dcm"
        image.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths
