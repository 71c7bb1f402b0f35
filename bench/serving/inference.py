"""Images a second of the served graph (onnxruntime, as deploy.server.session runs it), of PyTorch eager, and of int8.

    python bench/serving/inference.py [--quick] [--threads N] [--data DIR --backbone FILE [--parity-only]]

A ViT-S/16 at 224 px, 512 x 512 plates in, batches of 1 and 8, in turns in one process. Eager is timm's network after
the same resize, logits only; the served graph also returns embedding and heatmaps. int8 is onnxruntime's dynamic
quantisation of the matrix products. --data adds the loss of AUC by int8 on real images (inference_parity.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.common import machine, results
from bench.serving import inference_parity
from bench.serving.latency_site import FINDINGS, write_model
from deploy import runtime
from learner.networks.pooling import resize_matrix

BARS = {"fp32": 1.1, "int8": 1.5}  # times eager, at batch 8


class Eager(nn.Module):
    """Plain PyTorch: resize, timm's ViT, logits."""

    matrix: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("vit_small_patch16_224", num_classes=len(FINDINGS))
        self.register_buffer("matrix", resize_matrix(512, 224))

    def forward(self, plates: Tensor) -> Tensor:
        images = self.matrix @ (plates.float() / 255) @ self.matrix.T
        return self.net(images[:, None].expand(-1, 3, -1, -1))


def timed(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Return the median seconds of each run, on the wall and of the CPU; in turns, after one warm-up of each."""
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, work in runs.items():
            began, spent = time.perf_counter(), time.process_time()
            work()
            if turn:
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - spent)
    return {name: {"wall": median(wall[name]), "cpu": median(cpu[name])} for name in runs}


def compare(model: Path, int8: Path, threads: int, rounds: int) -> dict[str, dict]:
    """Return {batch: {name: images a second, times eager (wall), times eager (CPU)}}."""
    torch.set_num_threads(threads)
    eager = Eager().eval()
    sessions = {
        name: runtime.load(path.read_bytes(), "cpu", threads) for name, path in (("fp32", model), ("int8", int8))
    }
    speed = {}
    for batch in (1, 8):
        plates = np.random.default_rng(batch).integers(0, 256, (batch, 512, 512), np.uint8)

        def in_torch(plates: Tensor = torch.from_numpy(plates)) -> Tensor:
            with torch.inference_mode():
                return eager(plates)

        runs: dict[str, Callable[[], object]] = {"eager": in_torch}
        for name, session in sessions.items():
            runs[name] = lambda session=session, plates=plates: runtime.run(session, plates)
        seconds = timed(runs, rounds)
        speed[str(batch)] = {
            name: {
                "images_s": round(batch / took["wall"], 2),
                "of_eager": round(seconds["eager"]["wall"] / took["wall"], 3),
                "of_eager_cpu": round(seconds["eager"]["cpu"] / took["cpu"], 3),
            }
            for name, took in seconds.items()
        }
    return speed


def random_difference(model: Path, int8: Path) -> dict[str, float]:
    """Return the largest difference in probability on noise, with random weights."""
    plates = np.random.default_rng(1).integers(0, 256, (8, 512, 512), np.uint8)
    logits = [runtime.run(runtime.load(path.read_bytes(), "cpu"), plates)[0].astype(float) for path in (model, int8)]
    p, q = (1 / (1 + np.exp(-z)) for z in logits)
    return {"images": len(plates), "largest_difference": float(np.abs(p - q).max())}


def measure_speed(options: argparse.Namespace, scratch: Path) -> dict:
    """Print the speed table; return it with the machine's facts."""
    rounds, model = 3 if options.quick else 25, options.model or scratch / "model.onnx"
    if options.model is None:
        write_model(model)
    int8 = inference_parity.quantised(model, scratch / "int8.onnx")
    speed = compare(model, int8, options.threads, rounds)
    print(f"{'':28} images/s  of eager  of eager (processor)")
    for batch, rows in speed.items():
        for name, row in rows.items():
            print(f"batch {batch}  {name:20} {row['images_s']:7.2f} {row['of_eager']:8.2f} {row['of_eager_cpu']:8.2f}")
    for name, bar in BARS.items():
        print(f"bar {name} >= {bar:g}x at batch 8:", "met" if speed["8"][name]["of_eager"] >= bar else "missed")
    used = machine.facts("torch", "onnxruntime", threads=options.threads)
    facts = {"machine": used, "rounds": rounds, "speed": speed}
    return facts | {"int8_parity": {"random weights": random_difference(model, int8)}}


def main() -> None:
    """Measure speed and parity, print and write; figures of a part that was not run stay in the file."""
    parser = results.parser(__doc__, "inference.json")
    parser.add_argument("--quick", action="store_true", help="3 rounds in place of 25")
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--model", type=Path, help="an exported ViT-S with 3 findings; default: a new one")
    parser.add_argument("--data", type=Path, help="folder with kermany224/: measures the loss of AUC by int8")
    parser.add_argument("--backbone", type=Path, help="pretrained ViT-S (.safetensors, timm's key names), with --data")
    parser.add_argument("--parity-only", action="store_true", help="no speed: the figures in --out stay as they are")
    parser.add_argument("--work", type=Path, help="folder that keeps the steps of the parity, to resume a killed run")
    options = parser.parse_args()
    if (options.data is None) != (options.backbone is None) or (options.parity_only and options.data is None):
        parser.error("parity needs both --data DIR and --backbone FILE")
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    parity = result.get("int8_parity", {})
    with tempfile.TemporaryDirectory() as scratch:
        if not options.parity_only:
            result |= measure_speed(options, Path(scratch))
            parity |= result["int8_parity"]
        if options.data:
            work = options.work or Path(scratch) / "parity"
            parity["trained"] = inference_parity.measure(options.data, options.backbone, work, options.threads)
            inference_parity.show(parity["trained"])
    results.write(options.out, result | {"int8_parity": parity})


if __name__ == "__main__":
    main()
