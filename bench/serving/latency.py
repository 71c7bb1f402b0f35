"""How long an image takes through the whole appliance, and how many images a second it can take for good.

`python bench/serving/latency.py` (Orthanc needed, 20 minutes; `--quick`: 3) runs `cxrloop serve` with a ViT-S/16 at 224 on the CPU and
SR and SC on, Orthanc as the PACS, images by C-STORE. Sender and Orthanc share the cores that are measured. Writes
bench/results/latency.json. Bar: p95 below 5 s at 1 image a second, to the prediction and to both results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.serving.latency_run import STEPS, Run, cpu_seconds, is_steady, percentiles
from bench.serving.latency_site import SYNTAXES, Place, running, template, write_model

ROOT = Path(__file__).resolve().parents[2]
BAR_S = 5.0
WARM = 3  # images before the clock starts: the decoder and highdicom are loaded with the first
AHEAD = 8  # images that wait while the limit is looked for
BACK = 0.95  # of the rate that was tried last: the next one to try


def at_one_a_second(place: Place, scratch: Path, folder: Path, count: int, syntax: str) -> dict:
    """Percentiles from Success on, stage by stage, and CPU seconds an image."""
    warm(place, scratch, syntax)
    run, before = Run(place, template(syntax), scratch), cpu_seconds(folder)
    queue = run.at_rate(1.0, count)
    run.drain()
    spent = {part: round((s - before.get(part, 0)) / count, 3) for part, s in cpu_seconds(folder).items()}
    run.close()
    seconds = run.seconds()
    parts = {STEPS[0]: seconds[STEPS[0]]}
    for earlier, later in pairwise(STEPS):
        parts[f"{earlier} to {later}"] = [b - a for a, b in zip(seconds[earlier], seconds[later], strict=True)]
    return {
        "images": count, "syntax": syntax, "since_success": {step: percentiles(seconds[step]) for step in STEPS},
        "stages": {name: percentiles(values) for name, values in parts.items()},
        "cpu_seconds_a_image": spent, "most_waiting": max(queue),
    }  # fmt: skip


def highest(place: Place, scratch: Path, folder: Path, syntax: str, seconds: float) -> dict:
    """The rate at which images are answered while some always wait; then the highest that makes no queue grow."""
    warm(place, scratch, syntax)
    run, before = Run(place, template(syntax), scratch), cpu_seconds(folder)
    limit = run.saturate(AHEAD, seconds)
    run.drain()
    sent = len(run.sent)
    spent = {part: round((s - before.get(part, 0)) / sent, 3) for part, s in cpu_seconds(folder).items()}
    rate, tried, steady = BACK * limit, [], False
    while rate > limit / 2 and not steady:
        queue = run.at_rate(rate, max(6, round(rate * seconds)))
        steady = is_steady(queue)
        tried.append({"rate": round(rate, 2), "steady": steady, "most_waiting": max(queue)})
        run.drain()
        rate *= 1 if steady else BACK
    run.close()
    return {
        "saturated": round(limit, 2), "steady": round(rate, 2) if steady else None, "tried": tried,
        "cpu_seconds_a_image": spent,
    }  # fmt: skip


def warm(place: Place, scratch: Path, syntax: str) -> None:
    run = Run(place, template(syntax), scratch)
    run.at_rate(1.0, WARM)
    run.drain()
    run.close()


def show(found: dict) -> None:
    one = found["one_a_second"]
    print(f"\n{one['images']} images, {one['syntax']}, 1 a second; seconds from Success   p50    p95    p99")
    for name, p in [*one["since_success"].items(), *one["stages"].items()]:
        print(f"  {name:50} {p['p50']:6.2f} {p['p95']:6.2f} {p['p99']:6.2f}")
    print("  CPU seconds an image:", one["cpu_seconds_a_image"])
    print("\nhighest rate, images a second      saturated   steady   CPU seconds an image")
    for syntax, rate in found["highest"].items():
        print(f"  {syntax:30} {rate['saturated']:9.2f} {rate['steady'] or 0:9.2f}   {rate['cpu_seconds_a_image']}")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--quick", action="store_true", help="20 images, one syntax, windows of 15 s")
    words.add_argument("--images", type=int, default=300)
    words.add_argument("--window", type=float, default=60, help="seconds a rate is held")
    words.add_argument("--threads", type=int, default=0, help="threads of one inference; 0 = as many as cores")
    words.add_argument(
        "--model", type=Path, help="an ONNX file of the bundle contract with 3 findings; default: a new ViT-S"
    )
    words.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "latency.json")
    asked = words.parse_args()
    images, window = (20, 15.0) if asked.quick else (asked.images, asked.window)
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }
    with (
        tempfile.TemporaryDirectory(prefix="latency-") as kept,
        tempfile.TemporaryDirectory(prefix="images-") as scratch,
    ):
        folder, model, name = Path(kept), asked.model, str(asked.model)
        if model is None:
            model = folder / "model.onnx"
            _, name = write_model(model)
        with running(folder, model, asked.threads) as place:
            one = at_one_a_second(place, Path(scratch), folder, images, SYNTAXES[0])
            syntaxes = SYNTAXES[:1] if asked.quick else SYNTAXES
            rates = {syntax: highest(place, Path(scratch), folder, syntax, window) for syntax in syntaxes}
    late = [step for step in STEPS if one["since_success"][step]["p95"] >= BAR_S]
    found = {"model": name, "machine": machine, "window_s": window, "one_a_second": one, "highest": rates, "bar_s": BAR_S,
             "late": late}  # fmt: skip
    show(found)
    print(f"\nbar p95 < {BAR_S:g} s at 1 image a second:", f"missed by {', '.join(late)}" if late else "kept")
    asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
