"""What a feed costs as a site grows: 1,000, 10,000 and 100,000 images, packed and then read through for one pass.

Each number of images runs in its own process, on one thread; time per image and memory should stay level. The plates are
1,000 synthetic ones under as many names as it takes (hard links: the disk isn't timed), packed at a small size that fits
any disk. Says nothing of training.

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

Result = TypeVar("Result")

PLATES, PER_FOLDER = 1000, 1000
SPAN = 31  # batches timed together; 1,000 images are two spans a pass
LEAST = 10_000  # images read at least, in as many passes as it takes
SIZE, LOCAL = 48, 24  # pixels: 4.6 kB an image
LEVEL = 1.25  # time per image at the largest number over that at the smallest, and so for memory, that counts as level
SLACK_MB = 16  # memory may differ by this much between processes that do the same: allocator and threads


def write_plates(folder: Path) -> None:
    (folder / "plates").mkdir()
    for i in range(PLATES):
        coarse = np.random.default_rng(i).integers(0, 256, (16, 16), dtype=np.uint8)
        np.save(folder / "plates" / f"{i}.npy", np.kron(coarse, np.ones((32, 32), np.uint8)))


def link_plates(folder: Path, number: int) -> None:
    """`number` names for the plates, in `folder/links/<thousand>/<i>.npy`."""
    for i in range(number):
        if i % PER_FOLDER == 0:
            (folder / "links" / str(i // PER_FOLDER)).mkdir(parents=True, exist_ok=True)
        name = folder / "links" / str(i // PER_FOLDER) / f"{i}.npy"
        if not name.exists():
            os.link(folder / "plates" / f"{i % PLATES}.npy", name)


def memory(*names: str) -> list[float]:
    """Fields of this process's status, in MB: RssAnon is its own memory, RssFile what is mapped from files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[name].split()[0]) / 1e3 for name in names]


def watched(work: Callable[[], Result]) -> tuple[Result, float, float]:
    """What the work gives, its processor seconds, and the highest RssAnon in MB, looked at every 20 ms (the kernel keeps no peak of it)."""
    peak, over = memory("RssAnon"), threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            peak.extend(memory("RssAnon"))

    watch = threading.Thread(target=look)
    watch.start()
    began = time.process_time()
    result = work()
    spent = time.process_time() - began
    over.set()
    watch.join()
    return result, spent, max(peak)


def one(folder: Path, number: int) -> dict[str, float]:
    """Pack and read `number` images; times in ms of processor an image, memory in MB."""
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
    _, packing, packing_peak = watched(lambda: open_packed_plates(folder, samples, SIZE))
    shard = open_packed_plates(folder, samples, SIZE)  # found, not made again
    feed = ImageFeed(samples, recipe, torch.device("cpu"), "unlabelled", fixed_order=False, packed=shard)
    feed.batch(0, 0).views(slice(0, 4))

    passes = -(-LEAST // number)

    def spans(views: bool) -> list[float]:
        """Processor seconds an image, of spans of some 500 images: the median forgives what else the machine does."""
        spent = []
        for sweep, first in product(range(passes), range(0, feed.batches - SPAN + 1, SPAN)):
            began = time.process_time()
            for index in range(first, first + SPAN):
                batch = feed.batch(sweep, index)
                if views:
                    batch.views(slice(0, batch.size))
            spent.append((time.process_time() - began) / (SPAN * feed.size))
        return spent

    reading, _, _ = watched(lambda: spans(views=False))
    feeding, _, feeding_peak = watched(lambda: spans(views=True))
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


def level(rows: list[dict[str, float]], key: str, slack: float) -> bool:
    return rows[-1][key] <= max(rows[0][key] * LEVEL, rows[0][key] + slack)


def show(rows: list[dict[str, float]], bars: dict[str, bool]) -> None:
    print(
        f"packed at {SIZE} px; processor ms an image; MB of own memory (RssAnon) above the list of images; mapped = shard's pages"
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
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--images", type=int, nargs="+", default=[1000, 10_000, 100_000])
    ask.add_argument("--folder", type=Path, help="where the plates are made; default: the system's temporary folder")
    ask.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[2] / "bench" / "results" / "growth_images.json"
    )
    ask.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = ask.parse_args()
    if args.one:
        print(json.dumps(one(args.folder, args.one)))
        return
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_plates(Path(folder))
        for number in args.images:
            link_plates(Path(folder), number)
            child = [sys.executable, __file__, "--one", str(number), "--folder", folder]
            rows.append(json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout))
    bars = {key: level(rows, key, 0.0) for key in ("pack_ms", "feed_ms")}
    bars |= {key: level(rows, key, SLACK_MB) for key in ("pack_mb", "feed_mb")}
    show(rows, bars)
    args.out.write_text(json.dumps({"size": SIZE, "rows": rows, "bars": bars}, indent=1) + "\n")


if __name__ == "__main__":
    main()
