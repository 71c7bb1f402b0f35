"""Speed of one DISTL step: the learner's own functions beside the published way, on the same synthetic images.

In one process, in turns; medians. Also what the step's matrix products alone would take: the ceiling of any way to
compute it, and with --compile our step again, its backbones through torch.compile. Says nothing of what is learned, and
nothing of a device it wasn't run on.

    python bench/speed/train_speed.py [--quick] [--compile] [--threads 1] [--out bench/results/train_speed_cpu.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.speed.matrix_products import Product, products_of_a_step, seconds_of
from bench.speed.published_way import BATCH, Trainer, loader
from learner.data.feed import ImageFeed
from learner.data.packed_plates import open_packed_plates
from learner.engine.optim import make_optimiser, make_schedule
from learner.engine.step import Batch, State
from learner.networks.backbone import plan_of
from learner.networks.heads import make_network
from learner.objectives.correction import distil_step
from learner.objectives.dino import DinoLoss
from learner.round.manifest import Sample
from learner.round.recipe import Recipe, resolve

SAMPLES, FINDINGS = 64, 2
SETTINGS = {
    "cuda": ("gpu", {"arch": "vit_small_patch8"}),  # ViT-S/8, 256 px, 2 + 8 views: as published
    "cpu": ("cpu", {"arch": "vit_tiny_patch16", "image_size": 128, "local_size": 64, "local_views": 8, "pool": "cls"}),
}
BARS = {"cpu": {"ratio": 1.0}, "cuda": {"ratio": 5.0, "share": 0.6}}


def write_samples(folder: Path, number: int) -> list[Sample]:
    """Smooth grey images with a little grain, as plates for us and as PNG for the published way."""
    samples = []
    for i in range(number):
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12), dtype=np.uint8)).resize(
            (512, 512), Image.Resampling.BICUBIC
        )
        plate = np.clip(np.asarray(coarse) + rng.normal(0, 2, (512, 512)), 0, 255).astype(np.uint8)
        np.save(folder / f"{i}.npy", plate)
        Image.fromarray(plate).save(folder / f"{i}.png")
        samples.append(Sample(i, f"p{i}", folder / f"{i}.npy", "train", (None,) * FINDINGS))
    return samples


class Ours:
    """The learner's feed and its step."""

    def __init__(
        self, samples: list[Sample], folder: Path, recipe: Recipe, device: torch.device, compiled: bool
    ) -> None:
        plan = plan_of(recipe.arch, recipe.image_size)
        student = make_network(plan, recipe, FINDINGS, recipe.drop_path).to(device)
        teacher = make_network(plan, recipe, FINDINGS).to(device).requires_grad_(False)
        teacher.load_state_dict(student.state_dict())
        if compiled:
            student.backbone.compile()
            teacher.backbone.compile()
        dino = DinoLoss(recipe.prototypes, recipe.student_temp, recipe.teacher_temp, recipe.centre_momentum).to(device)
        self.state = State(
            student=student, teacher=teacher, optimiser=make_optimiser(student),
            schedule=make_schedule(recipe, 5, 1000, recipe.lr, recipe.batch), recipe=recipe,
            scaler=torch.amp.GradScaler(device.type, enabled=False), centres=nn.ModuleDict({"dino": dino}),
            dtype=torch.bfloat16 if device.type == "cuda" else None,
        )  # fmt: skip
        shard = open_packed_plates(folder, samples, recipe.image_size)
        self.feed = ImageFeed(samples, recipe, device, "unlabelled", fixed_order=False, packed=shard)

    def batches(self) -> Iterator[Batch]:
        for step in count():
            yield self.feed.batch(*divmod(step, self.feed.batches))

    def data(self, batch: Batch) -> None:
        """The part of a step that is data: the views are made on the device."""
        batch.views(slice(0, batch.size))

    def step(self, batch: Batch) -> None:
        distil_step(self.state, batch)
        self.state.step += 1


class Published:
    """Two batches of 8 for each of our 16."""

    def __init__(self, samples: list[Sample], recipe: Recipe, device: torch.device, workers: int) -> None:
        self.trainer = Trainer(plan_of(recipe.arch, recipe.image_size), recipe, FINDINGS, device)
        files = [sample.plate.with_suffix(".png") for sample in samples]
        self.loader = loader(files, recipe, workers, device.type == "cuda")

    def batches(self) -> Iterator[list]:
        while True:
            batches = iter(self.loader)
            for batch in batches:
                yield [batch, next(batches)]

    def data(self, pair: list) -> None:
        """All of it happened in the loading path."""

    def step(self, pair: list) -> None:
        for views in pair:
            self.trainer.step(views)


def timed(device: torch.device, work: Callable[[], object]) -> tuple[float, float, float]:
    """Wall seconds, processor seconds of this process, and the peak of memory meanwhile in MB."""
    finish = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    finish()
    reset_peak(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    finish()
    return time.perf_counter() - wall, time.process_time() - cpu, peak_mb(device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (marks := Path("/proc/self/clear_refs")).exists():
        marks.write_text("5")  # VmHWM starts again from what is resident now


def peak_mb(device: torch.device) -> float:
    """CUDA: allocated by torch. CPU: resident memory of the whole process, both ways' weights included (nan = unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM")), float("nan"))


def measure(way: Ours | Published, device: torch.device, samples: int, feed: Iterator) -> dict[str, float]:
    """One repetition: the feed alone, then whole steps, for `images` images."""

    def fetch() -> None:
        way.data(next(feed))

    def whole() -> None:
        way.step(next(feed))

    data, data_cpu, _ = timed(device, fetch)
    wall, cpu, peak = timed(device, whole)
    return {
        "images_per_s": samples / wall,
        "images_per_cpu_s": samples / cpu,
        "data_share": data / wall,
        "data_share_cpu": data_cpu / cpu,
        "peak_mb": peak,
    }


def run(args: argparse.Namespace, folder: Path) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    profile, sizes = SETTINGS[device.type]
    recipe = resolve("distl", profile, {**sizes, "threads": args.threads, "device": device.type})
    samples = write_samples(folder, SAMPLES)
    workers = 0 if device.type == "cpu" else min(8, torch.multiprocessing.cpu_count())
    ways: dict[str, Ours | Published] = {"ours": Ours(samples, folder, recipe, device, compiled=False)}
    if args.compile:
        ways["compiled"] = Ours(samples, folder, recipe, device, compiled=True)
    ways["published"] = Published(samples, recipe, device, workers)
    feeds = {name: way.batches() for name, way in ways.items()}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for repetition in range(1 + (3 if args.quick else args.repetitions)):
        for name, way in ways.items():
            row = measure(way, device, 2 * BATCH, feeds[name])
            if repetition:  # the first warms caches, allocators and the compiler
                rows[name].append(row)
    products = products_of_a_step(plan_of(recipe.arch, recipe.image_size), recipe, FINDINGS)
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    return summary(args, device, recipe, rows, products, seconds_of(products, device, half, 2 if args.quick else 5))


def summary(
    args: argparse.Namespace, device: torch.device, recipe: Recipe, rows: dict[str, list[dict[str, float]]],
    products: list[Product], alone: dict[str, float],
) -> dict:  # fmt: skip
    medians = {name: {key: median(row[key] for row in of) for key in of[0]} for name, of in rows.items()}
    ceiling = {"images_per_s": recipe.batch / alone["wall"], "images_per_cpu_s": recipe.batch / alone["cpu"]}
    ours = [name for name in rows if name != "published"]
    pairs = {name: list(zip(rows[name], rows["published"], strict=True)) for name in ours}
    ratio = {name: {key: median(a[key] / b[key] for a, b in pairs[name]) for key in ceiling} for name in ours}
    share = {name: {key: medians[name][key] / ceiling[key] for key in ceiling} for name in ours}
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    )
    bars = BARS[device.type]
    return {
        "machine": f"{name}, {os.cpu_count()} cores, {args.threads} used; torch {torch.__version__}, Python {platform.python_version()}",
        "setting": f"{recipe.arch}, {recipe.image_size} px, 2 + {recipe.local_views} views ({recipe.local_size} px), "
        f"{recipe.prototypes} prototypes, batch {recipe.batch} and {BATCH}",
        "repetitions": len(rows["ours"]), "medians": medians, "ratio": ratio,
        "ceiling": ceiling, "share_of_ceiling": share,
        "products": {"kinds": len(products), "gigaflop": sum(p.flop for p in products) / 1e9},
        "bars": {
            "ratio": {"required": bars["ratio"], "met": ratio["ours"]["images_per_s"] >= bars["ratio"]},
            "share": {"required": bars["share"], "met": share["ours"]["images_per_s"] >= bars["share"]}
            if "share" in bars
            else None,
            "on CUDA (>= 5 x, >= 60 %)": "see above" if device.type == "cuda" else "not measured",
        },
    }  # fmt: skip


def show(result: dict) -> None:
    print(result["machine"], result["setting"], sep="\n")
    print(
        f"{'':10} {'images/s':>9} {'images/cpu s':>12} {'data share':>11} {'peak MB':>9}   medians of {result['repetitions']}"
    )
    for name, row in result["medians"].items():
        print(
            "{:10} {images_per_s:9.2f} {images_per_cpu_s:12.2f} {data_share:11.1%} {peak_mb:9.0f}".format(name, **row)
        )
    products = "{:10} {images_per_s:9.2f} {images_per_cpu_s:12.2f}   alone, back to back"
    print(products.format("products", **result["ceiling"]))
    for name, ratio in result["ratio"].items():
        print("{:10} {images_per_s:9.2f} {images_per_cpu_s:12.2f}   x published".format(name, **ratio))
        share = result["share_of_ceiling"][name]
        print("{:10} {images_per_s:9.0%} {images_per_cpu_s:12.0%}   of the products' speed".format("", **share))
    for name, bar in ((name, bar) for name, bar in result["bars"].items() if bar):
        print(f"bar {name}: {bar if not isinstance(bar, dict) else 'met' if bar['met'] else 'MISSED'}")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--quick", action="store_true", help="three repetitions")
    ask.add_argument("--compile", action="store_true", help="a third way: ours, compiled (minutes, needs g++)")
    ask.add_argument("--threads", type=int, default=1)
    ask.add_argument("--repetitions", type=int, default=9)
    ask.add_argument("--out", type=Path, help="default: bench/results/train_speed_{cpu,cuda}.json; not with --quick")
    args = ask.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(args, Path(folder))
    show(result)
    out = (
        args.out
        or Path(__file__).resolve().parents[2]
        / "bench"
        / "results"
        / f"train_speed_{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
    )
    if args.out or not args.quick:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
