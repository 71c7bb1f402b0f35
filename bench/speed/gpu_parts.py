"""The parts of `make gpu`, one a process: each prints its figures as JSON in its last line, or fails with a reason.

    python bench/speed/gpu_parts.py machine|speed|memory|serving|tests --device cuda|cpu [--small]

Imports within the functions: a part must not fail because a package of another part is missing.
"""

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

PARITY = 1e-3  # largest difference in probability, as the gate allows
SAME_STEP = 1e-3  # relative difference of two gradients: a halved pass sums in another order
ROOMS = (0.9, 0.8, 0.7, 0.6, 0.5)  # of the memory that a step takes: the first at which it runs out counts
ROUNDS = 30  # repetitions of a latency


def machine(device: str, small: bool) -> dict[str, Any]:
    """Return the device's name, memory and abilities."""
    import torch

    facts: dict[str, Any] = {"torch": torch.__version__, "cores": os.cpu_count()}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts |= {
            "name": card.name, "memory_mb": card.total_memory >> 20, "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "bf16": torch.cuda.is_bf16_supported(),
        }  # fmt: skip
    side = 256 if small else 4096
    left = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    product = (left @ left).float()
    if not bool(torch.isfinite(product).all()):
        raise SystemExit("a product of two bf16 matrices is not finite on this device")
    return facts


def speed(device: str, small: bool) -> dict[str, Any]:
    """Return the result of train_speed: the learner's step against the published way, and the products alone."""
    from bench.speed import train_speed

    with tempfile.TemporaryDirectory() as folder:
        return train_speed.run(
            train_speed.options_of(["--quick", "--device", device, *(["--small"] if small else [])]), Path(folder)
        )


def memory(device: str, small: bool) -> dict[str, Any]:
    """Make memory run out in a step; return the notes and the difference of its gradient to the step with room."""
    import torch

    from bench.speed import train_speed
    from learner.engine.optim import make_schedule
    from learner.engine.step import Batch, Losses, State, run_steps
    from learner.objectives.distl_steps import unlabelled_step
    from learner.round.recipe import resolve

    torch.set_num_threads(1)
    if device == "cpu":
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: freed memory goes back, and a limit is felt
    on = torch.device(device)
    profile, sizes = train_speed.SETTINGS["small" if small else device]
    recipe = resolve("distl", profile, {**sizes, "device": device, "drop_path": 0.0, "batch": 48 if small else 16})

    def step(folder: Path, room_mb: float | None) -> tuple[torch.Tensor, float, list[str]]:
        """Return the gradient in host memory, the MB that the step took, and its notes."""
        torch.manual_seed(1)
        folder.mkdir()
        way = train_speed.Learner(train_speed.write_samples(folder, recipe.batch), folder, recipe, on, compiled=False)
        way.state.dtype = None  # float32: the comparison must not be about rounding
        way.state.schedule = make_schedule(recipe, 1, 1, recipe.lr, recipe.batch)
        batch = next(way.batches())

        def one(state: State, batch: Batch = batch) -> Losses:
            losses = unlabelled_step(state, batch)
            state.step += 1
            return losses

        before, _ = used_mb(on), train_speed.reset_peak(on)
        with limited(on, room_mb):
            run_steps(way.state, one, lambda losses: None)
        gradients = [p.grad.flatten().cpu() for p in way.state.student.parameters() if p.grad is not None]
        return torch.cat(gradients), train_speed.peak_mb(on) - before, way.state.notes

    with tempfile.TemporaryDirectory() as folder:
        whole, took, notes = step(Path(folder) / "whole", None)
        if notes:
            raise SystemExit(f"memory ran out without a limit: {notes}")
        for room in ROOMS:
            halved, _, notes = step(Path(folder) / str(room), room * took)
            if notes:
                break
        else:
            raise SystemExit(f"a step takes {took:.0f} MB, and {ROOMS[-1]} of that was enough")
    apart = float((whole - halved).norm() / whole.norm())
    if not apart < SAME_STEP:
        raise SystemExit(f"the gradient of the halved pass differs by {apart:.2g}, allowed {SAME_STEP:g}")
    return {"notes": notes, "gradient_difference": apart, "step_mb": round(took), "room": room}


def used_mb(device: Any) -> float:
    """Return the memory in use in MB: allocated by torch on CUDA, resident on the CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.memory_allocated() / 1e6
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


@contextmanager
def limited(device: Any, room_mb: float | None) -> Iterator[None]:
    """Leave this process `room_mb` more memory than it uses now, on the device; None: no limit."""
    import torch

    if room_mb is None:
        yield
    elif device.type == "cuda":
        torch.cuda.empty_cache()
        share = (used_mb(device) + room_mb) * 1e6 / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        yield
        torch.cuda.set_per_process_memory_fraction(1.0)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        status = Path("/proc/self/status").read_text().splitlines()
        data_kb = next(int(line.split()[1]) for line in status if line.startswith("VmData"))
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, ((data_kb << 10) + int(room_mb * 1e6), hard))
        yield
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def serving(device: str, small: bool) -> dict[str, Any]:
    """Return parity and latency of the served graph on the device, which must not fall back to the CPU."""
    import numpy as np
    import torch

    from deploy import runtime
    from learner.networks.architecture import plan_of
    from learner.networks.backbone import build
    from learner.networks.heads import ClassHead, Network
    from learner.round.recipe import resolve
    from learner.training.export import ServedModel, export_onnx

    torch.manual_seed(0)
    sizes = {"image_size": 160, "arch": "vit_tiny_patch16_depth2"} if small else {"image_size": 224}
    recipe = resolve("distl", "gpu", sizes)
    plan = plan_of(recipe.arch, recipe.image_size)
    backbone = build(plan, pool=recipe.pool)
    head = ClassHead(backbone.dim, 3, recipe.class_hidden)
    model = ServedModel(Network(backbone, torch.nn.Identity(), head), plan, recipe).eval()
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, Path(folder) / "model.onnx")
        graph = (Path(folder) / "model.onnx").read_bytes()
    session, on_cpu = runtime.load(graph, device), runtime.load(graph, "cpu")
    if runtime.running(session) != device:
        raise SystemExit(f"onnxruntime runs on {runtime.running(session)} in place of {device}")
    plates = np.random.default_rng(1).integers(0, 256, (4 if small else 64, 512, 512), np.uint8)
    logits = {"device": runtime.run(session, plates)[0], "cpu": runtime.run(on_cpu, plates)[0]}
    with torch.no_grad():
        logits["torch"] = torch.cat([model(part)[0] for part in torch.from_numpy(plates).split(16)]).numpy()
    chances = {name: 1 / (1 + np.exp(-value.astype(float))) for name, value in logits.items()}
    parity = {name: float(np.abs(chances["device"] - chances[name]).max()) for name in ("cpu", "torch")}
    if not max(parity.values()) <= PARITY:
        raise SystemExit(f"{device} differs by {parity} in probability, allowed {PARITY:g}")
    latency = {}
    for batch in (1, 8, 16):
        part = np.random.default_rng(2).integers(0, 256, (batch, 512, 512), np.uint8)
        took = []
        for turn in range(3 + (3 if small else ROUNDS)):
            began = time.perf_counter()
            runtime.run(session, part)
            took += [time.perf_counter() - began] if turn >= 3 else []  # the first ones warm the device up
        milliseconds = [1000 * seconds for seconds in took]
        latency[str(batch)] = {
            "median_ms": round(median(milliseconds), 3), "p95_ms": round(float(np.percentile(milliseconds, 95)), 3),
            "images_per_s": round(1000 * batch / median(milliseconds), 1),
        }  # fmt: skip
    return {
        "provider": runtime.running(session), "arch": recipe.arch, "image_size": recipe.image_size,
        "largest_difference": parity, "latency": latency,
    }  # fmt: skip


def tests(device: str, small: bool) -> dict[str, Any]:
    """Run the tests that take any device (tests/learner/engine/test_any_device.py) on this one."""
    environment = os.environ | {"CXRLOOP_TEST_DEVICE": device}
    report = Path(tempfile.mkdtemp()) / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-x" if small else "-q", "-p", "no:cacheprovider", "--noconftest"]
    command += [f"--junitxml={report}", "tests/learner/engine/test_any_device.py"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(ran.stdout[-4000:], ran.stderr[-1000:], flush=True)
    suite = ElementTree.parse(report).getroot()[0].attrib
    counts = {key: int(suite[key]) for key in ("tests", "failures", "errors", "skipped")}
    if ran.returncode or counts["skipped"] or not counts["tests"]:
        raise SystemExit(f"pytest ended with {ran.returncode}: {counts}")
    return counts | {"device": device}


PARTS = {"machine": machine, "speed": speed, "memory": memory, "serving": serving, "tests": tests}


def main() -> None:
    """Run one part and print its figures as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    figures = PARTS[options.part](options.device, options.small)
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
