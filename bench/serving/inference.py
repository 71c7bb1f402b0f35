"""Images a second of the served graph (onnxruntime, as deploy.server.session runs it) against plain PyTorch eager and int8.

`python bench/serving/inference.py [--quick] [--threads N]`: a ViT-S/16 at 224, 512 x 512 plates in, batches of 1 and 8 in turns in
one process. Eager is timm's network behind the same resize, logits only; ours also gives embedding and heatmaps. int8 is
onnxruntime's dynamic quantisation of the matrix products. `--data DIR --backbone FILE` adds what int8 costs in AUC on real
images (inference_parity.py; `--parity-only`: without the speed). Writes bench/results/inference.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.serving import inference_parity
from bench.serving.latency_site import FINDINGS, write_model
from deploy import runtime
from learner.data.augment import resize_matrix

RESULT = Path(__file__).resolve().parents[2] / "bench" / "results" / "inference.json"
BARS = {"fp32": 1.1, "int8": 1.5}  # of eager, at batch 8


class Eager(nn.Module):
    """What one writes without us: resize, timm's ViT, logits."""

    matrix: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("vit_small_patch16_224", num_classes=len(FINDINGS))
        self.register_buffer("matrix", resize_matrix(512, 224))

    def forward(self, plates: Tensor) -> Tensor:
        images = self.matrix @ (plates.float() / 255) @ self.matrix.T
        return self.net(images[:, None].expand(-1, 3, -1, -1))


def timed(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds by the wall and of the processor; in turns, after one of each for warming."""
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
    """{batch: {who: images a second, of eager (wall), of eager (processor)}}."""
    torch.set_num_threads(threads)
    eager = Eager().eval()
    sessions = {
        name: runtime.load(path.read_bytes(), "cpu", threads) for name, path in (("fp32", model), ("int8", int8))
    }
    found = {}
    for batch in (1, 8):
        plates = np.random.default_rng(batch).integers(0, 256, (batch, 512, 512), np.uint8)

        def in_torch(plates: Tensor = torch.from_numpy(plates)) -> Tensor:
            with torch.inference_mode():
                return eager(plates)

        runs: dict[str, Callable[[], object]] = {"eager": in_torch}
        for name, session in sessions.items():
            runs[name] = lambda session=session, plates=plates: runtime.run(session, plates)
        seconds = timed(runs, rounds)
        found[str(batch)] = {
            name: {
                "images_s": round(batch / took["wall"], 2),
                "of_eager": round(seconds["eager"]["wall"] / took["wall"], 3),
                "of_eager_cpu": round(seconds["eager"]["cpu"] / took["cpu"], 3),
            }
            for name, took in seconds.items()
        }
    return found


def random_difference(model: Path, int8: Path) -> dict[str, float]:
    """Largest difference in probability on noise, from weights that were never trained."""
    plates = np.random.default_rng(1).integers(0, 256, (8, 512, 512), np.uint8)
    logits = [runtime.run(runtime.load(path.read_bytes(), "cpu"), plates)[0].astype(float) for path in (model, int8)]
    p, q = (1 / (1 + np.exp(-z)) for z in logits)
    return {"images": len(plates), "largest_difference": float(np.abs(p - q).max())}


def measure_speed(asked: argparse.Namespace, scratch: Path) -> dict:
    """The speed table, printed, and what belongs to it."""
    rounds, model = 3 if asked.quick else 25, asked.model or scratch / "model.onnx"
    if asked.model is None:
        write_model(model)
    int8 = inference_parity.quantised(model, scratch / "int8.onnx")
    speed = compare(model, int8, asked.threads, rounds)
    print(f"{'':28} images/s  of eager  of eager (processor)")
    for batch, rows in speed.items():
        for name, row in rows.items():
            print(f"batch {batch}  {name:20} {row['images_s']:7.2f} {row['of_eager']:8.2f} {row['of_eager_cpu']:8.2f}")
    for name, bar in BARS.items():
        print(f"bar {name} >= {bar:g}x at batch 8:", "kept" if speed["8"][name]["of_eager"] >= bar else "missed")
    machine = {"cores": os.cpu_count(), "threads": asked.threads, "load": os.getloadavg()[0]}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    found = {"machine": machine, "versions": versions, "rounds": rounds, "speed": speed}
    return found | {"int8_parity": {"random weights": random_difference(model, int8)}}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--quick", action="store_true", help="3 rounds in place of 25")
    words.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    words.add_argument("--model", type=Path, help="an exported ViT-S with 3 findings; default: a new one")
    words.add_argument("--data", type=Path, help="folder of real images (kermany224 in it): what int8 costs in AUC")
    words.add_argument("--backbone", type=Path, help="pretrained ViT-S (.safetensors, timm's key names), with --data")
    words.add_argument("--parity-only", action="store_true", help="no speed: the figures in --out stay as they are")
    words.add_argument("--work", type=Path, help="keeps the parity's steps, so that a killed run goes on from there")
    words.add_argument("--out", type=Path, default=RESULT)
    asked = words.parse_args()
    if (asked.data is None) != (asked.backbone is None) or (asked.parity_only and asked.data is None):
        words.error("parity needs both --data DIR and --backbone FILE")
    found = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    kept = found.get("int8_parity", {})
    with tempfile.TemporaryDirectory() as scratch:
        if not asked.parity_only:
            found |= measure_speed(asked, Path(scratch))
            kept |= found["int8_parity"]
        if asked.data:
            work = asked.work or Path(scratch) / "parity"
            kept["trained"] = inference_parity.measure(asked.data, asked.backbone, work, asked.threads)
            inference_parity.show(kept["trained"])
    asked.out.write_text(json.dumps(found | {"int8_parity": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
