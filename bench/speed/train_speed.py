"""Speed of one DISTL step: the learner's own functions and the published way, on the same synthetic images.

In one process, in turns; medians. Also the time of the step's matrix products alone, the ceiling of any implementation,
and with --compile the learner's step with its backbones through torch.compile. It does not measure what is learnt, and
holds for the device it ran on only.

    python bench/speed/train_speed.py [--quick] [--compile] [--threads 1] [--out bench/results/train_speed_cpu.json]
"""

from __future__ import annotations

import argparse
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

from bench.common import machine, results
from bench.speed.matrix_products import Product, products_of_a_step, seconds_of
from bench.speed.published_way import BATCH, Trainer, loader
from learner.data.feed import ImageFeed
from learner.data.packed_plates import open_packed_plates
from learner.engine.optim import make_optimiser, make_schedule
from learner.engine.step import Batch, State
from learner.networks.architecture import plan_of
from learner.networks.heads import make_network
from learner.objectives.dino import DinoLoss
from learner.objectives.distl_steps import unlabelled_step
from learner.round.manifest import Sample
from learner.round.recipe import Recipe, resolve

SAMPLES, FINDINGS = 64, 2
SETTINGS = {
    "cuda": ("gpu", {"arch": "vit_small_patch8"}),  # ViT-S/8, 256 px, 2 + 8 views: as published
    "cpu": ("cpu", {"arch": "vit_tiny_patch16", "image_size": 128, "local_size": 64, "local_views": 8, "pool": "cls"}),
    "small": (  # to test the command, not to measure
        "cpu",
        {
            "arch": "vit_tiny_patch8_depth2", "image_size": 64, "local_size": 32, "local_views": 2, "pool": "cls",
            "prototypes": 64, "head_hidden": 16,
        },
    ),
}  # fmt: skip
BARS = {"cpu": {"ratio": 1.0}, "cuda": {"ratio": 5.0, "share": 0.6}}


def write_samples(folder: Path, number: int) -> list[Sample]:
    """Write smooth grey images with a little noise, as plates for the learner and as PNG for the published way."""
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


class Learner:
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
        packed = open_packed_plates(folder, samples, recipe.image_size)
        self.feed = ImageFeed(samples, recipe, device, "unlabelled", fixed_order=False, packed=packed)

    def batches(self) -> Iterator[Batch]:
        """Yield batches without end."""
        for step in count():
            yield self.feed.batch(*divmod(step, self.feed.batches))

    def data(self, batch: Batch) -> None:
        """Run the data part of a step: make the views on the device."""
        batch.views(slice(0, batch.size))

    def step(self, batch: Batch) -> None:
        """Take one optimiser step."""
        unlabelled_step(self.state, batch)
        self.state.step += 1


class Published:
    """The published way: two batches of 8 for each batch of 16 of the learner."""

    def __init__(self, samples: list[Sample], recipe: Recipe, device: torch.device, workers: int) -> None:
        self.trainer = Trainer(plan_of(recipe.arch, recipe.image_size), recipe, FINDINGS, device)
        files = [sample.plate.with_suffix(".png") for sample in samples]
        self.loader = loader(files, recipe, workers, device.type == "cuda")

    def batches(self) -> Iterator[list]:
        """Yield pairs of batches without end."""
        while True:
            batches = iter(self.loader)
            for batch in batches:
                yield [batch, next(batches)]

    def data(self, pair: list) -> None:
        """Nothing: all data work is in the loading path."""

    def step(self, pair: list) -> None:
        """Take two optimiser steps."""
        for views in pair:
            self.trainer.step(views)


def timed(device: torch.device, work: Callable[[], object]) -> tuple[float, float, float]:
    """Run `work`; return its wall seconds, its CPU seconds and the peak of memory in MB."""
    finish = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    finish()
    reset_peak(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    finish()
    return time.perf_counter() - wall, time.process_time() - cpu, peak_mb(device)


def reset_peak(device: torch.device) -> None:
    """Start a new peak of memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (marks := Path("/proc/self/clear_refs")).exists():
        marks.write_text("5")  # VmHWM restarts from the resident memory


def peak_mb(device: torch.device) -> float:
    """Return the peak in MB. CUDA: allocated by torch. CPU: resident memory of the process (nan = unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM")), float("nan"))


def measure(way: Learner | Published, device: torch.device, samples: int, feed: Iterator) -> dict[str, float]:
    """Return the figures of one repetition on `samples` images: the feed alone, then the whole step."""

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


def run(options: argparse.Namespace, folder: Path) -> dict:
    """Measure every way in turns and the matrix products alone; return the result."""
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    profile, sizes = SETTINGS["small" if options.small else device.type]
    recipe = resolve("distl", profile, {**sizes, "threads": options.threads, "device": device.type})
    samples = write_samples(folder, SAMPLES)
    workers = 0 if device.type == "cpu" else min(8, torch.multiprocessing.cpu_count())
    ways: dict[str, Learner | Published] = {"ours": Learner(samples, folder, recipe, device, compiled=False)}
    if options.compile:
        ways["compiled"] = Learner(samples, folder, recipe, device, compiled=True)
    ways["published"] = Published(samples, recipe, device, workers)
    feeds = {name: way.batches() for name, way in ways.items()}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for repetition in range(1 + (3 if options.quick else options.repetitions)):
        for name, way in ways.items():
            row = measure(way, device, 2 * BATCH, feeds[name])
            if repetition:  # the first repetition warms caches, allocators and the compiler
                rows[name].append(row)
    products = products_of_a_step(plan_of(recipe.arch, recipe.image_size), recipe, FINDINGS)
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    return summary(
        options, device, recipe, rows, products, seconds_of(products, device, half, 2 if options.quick else 5)
    )


def summary(
    options: argparse.Namespace, device: torch.device, recipe: Recipe, rows: dict[str, list[dict[str, float]]],
    products: list[Product], alone: dict[str, float],
) -> dict:  # fmt: skip
    medians = {
        name: {key: median(row[key] for row in own_rows) for key in own_rows[0]} for name, own_rows in rows.items()
    }
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
        "machine": machine.facts("torch", device=name, threads=options.threads),
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
    """Print the tables and the bars."""
    facts = "{device}, {cores} cores, {threads} used; torch {torch}, Python {python}".format(**result["machine"])
    print(facts, result["setting"], sep="\n")
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


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = results.parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to test this command")
    parser.add_argument("--quick", action="store_true", help="three repetitions")
    parser.add_argument("--compile", action="store_true", help="also the compiled learner (minutes, needs g++)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--out", type=Path, help="default: bench/results/train_speed_{cpu,cuda}.json; not with --quick")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print; write unless --quick or --small without --out."""
    options = options_of()
    with tempfile.TemporaryDirectory() as folder:
        result = run(options, Path(folder))
    show(result)
    if options.out or not (options.quick or options.small):
        results.write(options.out or results.RESULTS / f"train_speed_{options.device}.json", result)


if __name__ == "__main__":
    main()
