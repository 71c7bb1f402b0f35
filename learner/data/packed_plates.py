"""The plates of a round, resized to the network's image size, in one memory-mapped file: `ROUND/shard/`.

A round reads every plate many times; from this file a batch is a copy of a few rows. It is a cache: a restarted round uses
it if it was made of the same plates, and rebuilds it if not.

Pixels are 16-bit fixed point: level = round(65535 x) with x in [0, 1] from `augment.to_image`, which serving uses too.
So a pixel differs from serving by at most 1/131070 = 7.6e-6. float16, of the same size, would differ by up to 2.4e-4 and
uint8, of half the size, by up to 2.0e-3; tests/learner/data/test_packed_plates.py measures all three.
"""

import hashlib
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cxrloop.durable import whole_folder
from cxrloop.plate import PLATE_SHAPE, PLATE_VERSION
from learner.data import augment, cache_key
from learner.data.plates import read_plate
from learner.networks.pooling import resize_matrix
from learner.round.manifest import Sample

CHUNK = 4  # plates resized at once: 4 MB of float32 fit a core's cache; 64 at once need twice the time for each plate
READERS = 4  # threads that read the next chunk
REPORT_S = 1.0  # between two reports: a report writes a file
LEVELS = 65535
MIDDLE = 32768  # subtracted from levels to store them as int16: torch has no arithmetic on uint16

Report = Callable[[int, int], None]  # gets the number of images done, and of all


class PackedPlates:
    """Random access to the packed plates: `read(samples)` in host memory, then `images(levels)` on any device."""

    def __init__(self, folder: Path, samples: Sequence[Sample], size: int) -> None:
        shape = (len(samples), size, size)
        self.levels = np.memmap(folder / "levels.i16", np.int16, "r", shape=shape)
        ids = np.array([sample.image for sample in samples])
        self.row = np.argsort(ids)  # rows in ascending order of image ids: 16 bytes a sample, where a dict takes 100
        self.sorted_ids = ids[self.row]

    def read(self, samples: Sequence[Sample]) -> Tensor:
        """Return the levels of these samples, int16 (B, S, S), as a copy."""
        positions = np.searchsorted(self.sorted_ids, [sample.image for sample in samples])
        return torch.from_numpy(self.levels[self.row[positions]])

    def images(self, levels: Tensor) -> Tensor:
        """Return levels, int16 (B, S, S), as images, float32 (B, 1, S, S) in [0, 1]."""
        return levels.float().add_(MIDDLE).div_(LEVELS)[:, None]


def open_packed_plates(
    round_folder: Path, samples: Sequence[Sample], size: int, report: Report = lambda done, of: None
) -> PackedPlates | None:
    """Return the packed plates of these samples at `size` pixels, built now unless they exist; None where the disk is full.

    None comes with a warning. `report(done, of)` is called while they are built, and may raise Paused. Raises ManifestError for a missing or damaged plate. The folder is built whole or not at all.
    """
    folder, key = round_folder / "shard", key_of(samples, size)
    if not cache_key.matches(folder, key):
        shutil.rmtree(folder, ignore_errors=True)  # made of other plates, or at another size
        needed, free = len(samples) * size * size * 2, shutil.disk_usage(round_folder).free
        if needed > free // 2:  # the other half is for checkpoints and the results
            warnings.warn(
                f"{folder}: packed plates need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: plates are read "
                "one by one, which is slower; free twice the space to pack them",
                stacklevel=2,
            )
            return None
        with whole_folder(folder) as temp:
            pack(samples, size, temp / "levels.i16", report)
            cache_key.write_key(temp, key)
    return PackedPlates(folder, samples, size)


def remove_packed_plates(round_folder: Path) -> None:
    """Remove the packed plates of a round; does nothing where there are none."""
    shutil.rmtree(round_folder / "shard", ignore_errors=True)


def pack(samples: Sequence[Sample], size: int, target: Path, report: Report = lambda done, of: None) -> None:
    """Write the levels of all samples, in order, to `target`; holds at most two chunks in memory."""
    done, reported = 0, time.monotonic()
    matrix = resize_matrix(PLATE_SHAPE[0], size)
    with target.open("wb") as file, ThreadPoolExecutor(READERS, thread_name_prefix="pack") as pool:
        for plates in _chunks(samples, pool):
            levels = to_levels(augment.to_image(plates, matrix)).contiguous()
            file.write(levels.numpy().data)  # not tofile, which hides that the disk is full
            done += len(levels)
            if time.monotonic() - reported >= REPORT_S:
                report(done, len(samples))
                reported = time.monotonic()


def to_levels(images: Tensor) -> Tensor:
    """Return images (B, 1, S, S) in [0, 1] as levels, int16 (B, S, S)."""
    return (images[:, 0] * LEVELS).round().clamp(0, LEVELS).sub(MIDDLE).to(torch.int16)


def key_of(samples: Sequence[Sample], size: int) -> str:
    """Return a key of the plates' names, sizes and modification times, their order, the image size and the plate version."""
    digest = hashlib.sha256(f"levels {LEVELS} plates {PLATE_VERSION} size {size}\n".encode())
    for sample in samples:
        try:
            at = sample.plate.stat()
            digest.update(f"{sample.image} {sample.plate} {at.st_size} {at.st_mtime_ns}\n".encode())
        except (OSError, ValueError):  # missing, or not a possible file name
            read_plate(sample.plate)  # raises ManifestError with the reason
    return digest.hexdigest()


def _chunks(samples: Sequence[Sample], pool: ThreadPoolExecutor) -> Iterator[Tensor]:
    """Yield the plates in order, uint8 (at most CHUNK, 512, 512); the pool reads the next chunk meanwhile."""
    waiting = [pool.submit(read_plate, sample.plate) for sample in samples[:CHUNK]]
    for low in range(0, len(samples), CHUNK):
        ahead = [pool.submit(read_plate, sample.plate) for sample in samples[low + CHUNK : low + 2 * CHUNK]]
        yield torch.from_numpy(np.stack([plate.result() for plate in waiting]))
        waiting = ahead
