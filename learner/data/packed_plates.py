"""A round's plates in one memory-mapped file, already at the network's size: `ROUND/shard/`.

A round reads every plate many times; packed, a batch is a copy of a few rows. The file is a cache: whoever starts the
round again uses it if it was made of the very same plates, and makes it again if not. Knows no label and no view.

Pixels are 16-bit fixed point: level = round(65535 x), x in [0, 1] as `views.to_image` resizes in float32 for training
and serving alike. Training so sees each pixel within 1/131070 = 7.6e-6 of what serving sees; float16 of the same size
would be within 2.4e-4, uint8 within 2.0e-3 (half the file). tests/learner/data/test_packed_plates.py measures all three.
"""

import hashlib
import shutil
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cxrloop.durable import whole_folder
from cxrloop.plate import PLATE_SHAPE, PLATE_VERSION
from learner.data import augment, cache_key
from learner.data.plates import read_plate
from learner.round.manifest import Sample

CHUNK = 4  # plates resized at once: 4 MB of float32 stay in a core's cache; 64 at once take twice as long a plate
READERS = 4  # threads that read the next chunk meanwhile
LEVELS = 65535
MIDDLE = 32768  # levels are stored as int16 around 0: torch has no arithmetic on unsigned 16 bit


class PackedPlates:
    """Packed images of images, read by image: `read(images)` on the host, `images(levels)` on any device."""

    def __init__(self, folder: Path, samples: Sequence[Sample], size: int) -> None:
        shape = (len(samples), size, size)
        self.levels = np.memmap(folder / "levels.i16", np.int16, "r", shape=shape)
        images = np.array([sample.image for sample in samples])
        self.row = np.argsort(images)  # of the images in ascending order: 16 bytes an image, a dict takes 100
        self.sorted = images[self.row]

    def read(self, samples: Sequence[Sample]) -> Tensor:
        """int16 (B, S, S), a copy of the images' rows."""
        places = np.searchsorted(self.sorted, [sample.image for sample in samples])
        return torch.from_numpy(self.levels[self.row[places]])

    def images(self, levels: Tensor) -> Tensor:
        """int16 (B, S, S) -> float32 (B, 1, S, S) in [0, 1]."""
        return levels.float().add_(MIDDLE).div_(LEVELS)[:, None]


def open_packed_plates(round_folder: Path, samples: Sequence[Sample], size: int) -> PackedPlates | None:
    """The shard of these images at `size` pixels, made now unless it is there; None, with a warning, without room for it.

    Raises ManifestError for a missing or malformed plate. A half-made shard is never seen.
    """
    folder, key = round_folder / "shard", key_of(samples, size)
    if not cache_key.matches(folder, key):
        shutil.rmtree(folder, ignore_errors=True)  # of other plates, or of another size
        needed, free = len(samples) * size * size * 2, shutil.disk_usage(round_folder).free
        if needed > free // 2:  # the other half is for checkpoints and the results
            warnings.warn(
                f"{folder}: packed plates need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: plates are read "
                "one by one, which is slower; free twice the space to have them packed",
                stacklevel=2,
            )
            return None
        with whole_folder(folder) as temp:
            pack(samples, size, temp / "levels.i16")
            cache_key.write_key(temp, key)
    return PackedPlates(folder, samples, size)


def remove_packed_plates(round_folder: Path) -> None:
    """After a round that ended well: its shard is of no more use."""
    shutil.rmtree(round_folder / "shard", ignore_errors=True)


def pack(samples: Sequence[Sample], size: int, target: Path) -> None:
    """Write the levels of all images, in their order, to `target`; memory is that of two chunks, whatever their number."""
    matrix = augment.resize_matrix(PLATE_SHAPE[0], size)
    with target.open("wb") as file, ThreadPoolExecutor(READERS, thread_name_prefix="pack") as pool:
        for plates in _chunks(samples, pool):
            file.write(
                to_levels(augment.to_image(plates, matrix)).contiguous().numpy().data
            )  # tofile hides a full disk


def to_levels(images: Tensor) -> Tensor:
    """Images (B, 1, S, S) in [0, 1] -> int16 (B, S, S)."""
    return (images[:, 0] * LEVELS).round().clamp(0, LEVELS).sub(MIDDLE).to(torch.int16)


def key_of(samples: Sequence[Sample], size: int) -> str:
    """Changes with any plate's name, size or time of writing, the images' order, the image size and the pixel path."""
    digest = hashlib.sha256(f"levels {LEVELS} plates {PLATE_VERSION} size {size}\n".encode())
    for sample in samples:
        try:
            at = sample.plate.stat()
            digest.update(f"{sample.image} {sample.plate} {at.st_size} {at.st_mtime_ns}\n".encode())
        except (OSError, ValueError):  # not there, or no name that a file can have
            read_plate(sample.plate)  # says what is missing
    return digest.hexdigest()


def _chunks(samples: Sequence[Sample], pool: ThreadPoolExecutor) -> Iterator[Tensor]:
    """uint8 (at most CHUNK, 512, 512) in order, the next chunk being read meanwhile."""
    waiting = [pool.submit(read_plate, sample.plate) for sample in samples[:CHUNK]]
    for low in range(0, len(samples), CHUNK):
        ahead = [pool.submit(read_plate, sample.plate) for sample in samples[low + CHUNK : low + 2 * CHUNK]]
        yield torch.from_numpy(np.stack([plate.result() for plate in waiting]))
        waiting = ahead
