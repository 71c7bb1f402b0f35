"""Cost of the learner's feed as a site grows: 1,000, 10,000 and 100,000 images, packed and then read.

Each number of images runs in its own process, on one thread. Time per image and memory should stay level. There are
1,000 synthetic plates; hard links give them more names, so the disk is not measured. They are packed at a small size
that fits any disk. Training is not measured.

    python bench/learning/growth_images.py [--images 1000 10000 100000] [--folder DIR] [--out bench/results/growth_images.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.common import results

Result = TypeVar("Result")

PLATES, PER_FOLDER = 1000, 1000
SPAN = 31  # batches timed together; 1,000 images are two spans a pass
LEAST = 10_000  # images read, at least; small numbers take several passes
SIZE, LOCAL = 48, 24  # pixels: 4.6 kB an image
LEVEL = 1.25  # largest ratio that counts as level: at the largest number of images over the smallest
SLACK_MB = 16  # memory of equal processes differs by this much: allocator and threads


def write_plates(folder: Path) -> None:
    """Write the synthetic plates."""
    (folder / "plates").mkdir()
    for i in range(PLATES):
        coarse = np.random.default_rng(i).integers(0, 256, (16, 16), dtype=np.uint8)
        np.save(folder / "plates" / f"{i}.npy", np.kron(coarse, np.ones((32, 32), np.uint8)))


def link_plates(folder: Path, number: int) -> None:
    """Make `number` names for the plates, `folder/links/<thousand>/<i>.npy`."""
    for i in range(number):
        if i % PER_FOLDER == 0:
            (folder / "links" / str(i // PER_FOLDER)).mkdir(parents=True, exist_ok=True)
        name = folder / "links" / str(i // PER_FOLDER) / f"{i}.npy"
        if not name.exists():
            os.link(folder / "plates" / f"{i % PLATES}.npy", name)


def memory(*names: str) -> list[float]:
    """Return fields of this process's status, in MB: RssAnon is its own memory, RssFile is mapped from files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[name].split()[0]) / 1e3 for name in names]


def run_watched(work: Callable[[], Result]) -> tuple[Result, float, float]:
    """Run `work`; return its result, its CPU seconds and the highest RssAnon in MB, sampled every 20 ms."""
    peak, over = memory("RssAnon"), threading.Event()

    def sample() -> None:
        while not over.wait(0.02):
            peak.extend(memory("RssAnon"))

    watch = threading.Thread(target=sample)
    watch.start()
    began = time.process_time()
    result = work()
    spent = time.process_time() - began
    over.set()
    watch.join()
    return result, spent, max(peak)


def measure(folder: Path, number: int) -> dict[str, float]:
    """Pack and read `number` images; return CPU times in ms per image, memory in MB."""
    import torch

    from learner.data.feed import ImageFeed
    from learner.data.packed_plates import open_packed_plates, remove_packed_plates
    from learner.round.manifest import Sample
    from learner.round.recipe import resolve

    torch.set_num_threads(1)
    recipe = resolve("distl", "demo", {"image_size": SIZE, "local_size": LOCAL})
    (start,) = memory("RssAnon")
    samples = [
        Sample(i, f"p{i}", folder / "links" / str(i // PER_FOLDER) / f"{i}.npy", "train", (None,))
        for i in range(number)
    ]
    (listed,) = memory("RssAnon")
    _, packing, packing_peak = run_watched(lambda: open_packed_plates(folder, samples, SIZE))
    packed = open_packed_plates(folder, samples, SIZE)  # opens the packed file
    feed = ImageFeed(samples, recipe, torch.device("cpu"), "unlabelled", fixed_order=False, packed=packed)
    feed.batch(0, 0).views(slice(0, 4))

    passes = -(-LEAST // number)

    def spans(views: bool) -> list[float]:
        """Return the CPU seconds per image of spans of about 500 images; their median is robust to other load."""
        spent = []
        for sweep, first in product(range(passes), range(0, feed.batches - SPAN + 1, SPAN)):
            began = time.process_time()
            for index in range(first, first + SPAN):
                batch = feed.batch(sweep, index)
                if views:
                    batch.views(slice(0, batch.size))
            spent.append((time.process_time() - began) / (SPAN * feed.size))
        return spent

    reading, _, _ = run_watched(lambda: spans(views=False))
    feeding, _, feeding_peak = run_watched(lambda: spans(views=True))
    mapped, highest = memory("RssFile", "VmHWM")
    began = time.process_time()
    feed._make_order(7)
    shuffle = (time.process_time() - began) * 1e3
    remove_packed_plates(folder)
    each = 1e3 / number
    return {
        "images": number, "pack_ms": packing * each, "read_ms": median(reading) * 1e3, "feed_ms": median(feeding) * 1e3,
        "shuffle_ms_a_pass": shuffle, "start_mb": start, "list_mb": listed - start,
        "pack_mb": packing_peak - listed, "feed_mb": feeding_peak - listed, "mapped_mb": mapped, "highest_mb": highest,
        "shard_mb": number * SIZE * SIZE * 2 / 1e6,
    }  # fmt: skip


def is_level(rows: list[dict[str, float]], key: str, slack: float) -> bool:
    """Return whether a value at the largest number of images is at most LEVEL times, or `slack` above, the first."""
    return rows[-1][key] <= max(rows[0][key] * LEVEL, rows[0][key] + slack)


def show(rows: list[dict[str, float]], bars: dict[str, bool]) -> None:
    """Print the table and the bars."""
    print(
        f"packed at {SIZE} px; CPU ms per image; MB of own memory (RssAnon) above the list of images; mapped = pages of the packed file"
    )
    names = (
        "images",
        "pack_ms",
        "read_ms",
        "feed_ms",
        "shuffle_ms_a_pass",
        "list_mb",
        "pack_mb",
        "feed_mb",
        "mapped_mb",
        "highest_mb",
        "shard_mb",
    )
    print(" ".join(f"{name:>{max(9, len(name))}}" for name in names))
    for row in rows:
        print(
            " ".join(
                f"{row[name]:{max(9, len(name))},.{0 if name == 'images' else 3 if name.endswith('ms') else 1}f}"
                for name in names
            )
        )
    for name, met in bars.items():
        print(f"level: {name}: {'met' if met else 'MISSED'}")


def main() -> None:
    """Measure each number of images in its own process, print and write."""
    parser = results.parser(__doc__, "growth_images.json")
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--folder", type=Path, help="folder for the plates; default: the system's temporary folder")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.folder, options.one)))
        return
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_plates(Path(folder))
        for number in options.images:
            link_plates(Path(folder), number)
            child = [sys.executable, __file__, "--one", str(number), "--folder", folder]
            rows.append(json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout))
    bars = {key: is_level(rows, key, 0.0) for key in ("pack_ms", "feed_ms")}
    bars |= {key: is_level(rows, key, SLACK_MB) for key in ("pack_mb", "feed_mb")}
    show(rows, bars)
    results.write(options.out, {"size": SIZE, "rows": rows, "bars": bars})


if __name__ == "__main__":
    main()
