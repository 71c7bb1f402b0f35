"""Films a second of the served graph (onnxruntime, as deploy.session runs it) against plain PyTorch eager and int8.

`python bench/inference.py [--quick] [--threads N] [--data DIR]`: a ViT-S/16 at 224, 512 x 512 plates in, batches of 1 and 8 in
turns in one process. Eager is timm's network behind the same resize, logits only; ours also gives embedding and heatmaps.
int8 is onnxruntime's dynamic quantisation of the matrix products. `--data FOLDER` (a sealed bundle with trained weights and
`plates.npz`: plates [N, 512, 512], labels [N, F]) adds what int8 costs in AUC. Writes bench/results/inference.json.
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
import onnx
import onnxruntime
import timm
import torch
from latency_site import FINDINGS, write_model
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from deploy import runtime
from learner.auc import auc
from learner.views import resize_matrix

RESULT = Path(__file__).with_name("results") / "inference.json"
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


def quantised(model: Path, target: Path) -> Path:
    """Weights of the encoder's matrix products in int8, activations quantised while it runs; the head (Gemm) as it was."""
    plain = onnx.load(model)
    del plain.graph.value_info[
        :
    ]  # shapes noted by the exporter, which the quantiser takes for those of its own tensors
    tables = {table.name: table for table in plain.graph.initializer}
    for node in plain.graph.node:
        if node.op_type == "Gemm":  # the quantiser turns its table in place, also under whoever else uses it
            own = plain.graph.initializer.add()
            own.CopyFrom(tables[node.input[1]])
            own.name = node.input[1] = f"{node.name} table"
    quantize_dynamic(plain, target, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8, per_channel=True)
    return target


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
    """{batch: {who: films a second, of eager (wall), of eager (processor)}}."""
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
                "films_s": round(batch / took["wall"], 2),
                "of_eager": round(seconds["eager"]["wall"] / took["wall"], 3),
                "of_eager_cpu": round(seconds["eager"]["cpu"] / took["cpu"], 3),
            }
            for name, took in seconds.items()
        }
    return found


def parity(model: Path, int8: Path, plates: np.ndarray, labels: np.ndarray | None) -> dict:
    """Largest difference in probability, and the AUC of each finding with either."""
    said = {}
    for name, path in (("fp32", model), ("int8", int8)):
        logits = runtime.run(runtime.load(path.read_bytes(), "cpu"), plates)[0]
        said[name] = 1 / (1 + np.exp(-logits.astype(float)))
    found: dict = {"films": len(plates), "largest_difference": float(np.abs(said["fp32"] - said["int8"]).max())}
    if labels is not None:
        for name, scores in said.items():
            found[f"auc_{name}"] = [auc(scores[:, f], labels[:, f]) for f in range(labels.shape[1])]
    return found


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--quick", action="store_true", help="3 rounds in place of 25")
    words.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    words.add_argument("--model", type=Path, help="an exported ViT-S with 3 findings; default: a new one")
    words.add_argument("--data", type=Path, help="a bundle's folder with plates.npz: what int8 costs in AUC")
    words.add_argument("--out", type=Path, default=RESULT)
    asked = words.parse_args()
    rounds = 3 if asked.quick else 25
    with tempfile.TemporaryDirectory() as scratch:
        model = asked.model or Path(scratch) / "model.onnx"
        if asked.model is None:
            write_model(model)
        int8 = quantised(model, Path(scratch) / "int8.onnx")
        speed = compare(model, int8, asked.threads, rounds)
        noise = np.random.default_rng(1).integers(0, 256, (8, 512, 512), np.uint8)
        kept = {"random weights": parity(model, int8, noise, None)}
        if asked.data:
            with np.load(asked.data / "plates.npz") as films:
                trained = asked.data / "model.onnx"
                small = quantised(trained, Path(scratch) / "trained.onnx")
                kept["trained"] = parity(trained, small, films["plates"], films["labels"])
    machine = {"cores": os.cpu_count(), "threads": asked.threads, "load": os.getloadavg()[0]}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    print(f"{'':28} films/s  of eager  of eager (processor)")
    for batch, rows in speed.items():
        for name, row in rows.items():
            print(f"batch {batch}  {name:20} {row['films_s']:7.2f} {row['of_eager']:8.2f} {row['of_eager_cpu']:8.2f}")
    for name, bar in BARS.items():
        print(f"bar {name} >= {bar:g}x at batch 8:", "kept" if speed["8"][name]["of_eager"] >= bar else "missed")
    print("int8 against fp32:", json.dumps(kept))
    found = {"machine": machine, "versions": versions, "rounds": rounds, "speed": speed, "int8_parity": kept}
    asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
