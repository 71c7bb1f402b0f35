"""Latency of an image through the whole appliance, and the highest rate that it sustains.

    python bench/serving/latency.py [--quick]

Needs Orthanc; takes 20 minutes, with --quick 3. Runs `cxrloop serve` with a ViT-S/16 at 224 px on the CPU, SR and SC on,
Orthanc as the PACS, images by C-STORE. Sender and Orthanc use the same cores. Bar: p95 below 5 s at 1 image a second,
to the prediction and to both results.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.common import machine, results
from bench.serving.latency_run import STEPS, Run, cpu_seconds, is_steady, percentiles
from bench.serving.latency_site import SYNTAXES, Place, running, template, write_model

BAR_S = 5.0
WARM = 3  # images before the measurement; the first one loads the decoder and highdicom
AHEAD = 8  # images kept waiting while the limit is measured
BACK = 0.95  # each next rate, as a share of the last


def at_one_a_second(place: Place, scratch: Path, folder: Path, count: int, syntax: str) -> dict:
    """Return percentiles of the seconds from Success, stage by stage, and the CPU seconds for each image."""
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
        "cpu_seconds_per_image": spent, "most_waiting": max(queue),
    }  # fmt: skip


def highest(place: Place, scratch: Path, folder: Path, syntax: str, seconds: float) -> dict:
    """Return the rate of answers under saturation, and the highest rate at which the queue does not grow."""
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
        "cpu_seconds_per_image": spent,
    }  # fmt: skip


def warm(place: Place, scratch: Path, syntax: str) -> None:
    """Send a few images before a measurement."""
    run = Run(place, template(syntax), scratch)
    run.at_rate(1.0, WARM)
    run.drain()
    run.close()


def show(result: dict) -> None:
    """Print the tables."""
    steady = result["one_a_second"]
    print(f"\n{steady['images']} images, {steady['syntax']}, 1 a second; seconds from Success   p50    p95    p99")
    for name, p in [*steady["since_success"].items(), *steady["stages"].items()]:
        print(f"  {name:50} {p['p50']:6.2f} {p['p95']:6.2f} {p['p99']:6.2f}")
    print("  CPU seconds an image:", steady["cpu_seconds_per_image"])
    print("\nhighest rate, images a second      saturated   steady   CPU seconds an image")
    for syntax, rate in result["highest"].items():
        print(f"  {syntax:30} {rate['saturated']:9.2f} {rate['steady'] or 0:9.2f}   {rate['cpu_seconds_per_image']}")


def main() -> None:
    """Run the appliance, measure, print and write."""
    parser = results.parser(__doc__, "latency.json")
    parser.add_argument("--quick", action="store_true", help="20 images, one syntax, windows of 15 s")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--window", type=float, default=60, help="seconds a rate is held")
    parser.add_argument("--threads", type=int, default=0, help="threads of one inference; 0 = as many as cores")
    parser.add_argument(
        "--model", type=Path, help="an ONNX file of the bundle contract with 3 findings; default: a new ViT-S"
    )
    options = parser.parse_args()
    images, window = (20, 15.0) if options.quick else (options.images, options.window)
    before = machine.facts()
    with (
        tempfile.TemporaryDirectory(prefix="latency-") as kept,
        tempfile.TemporaryDirectory(prefix="images-") as scratch,
    ):
        folder, model, name = Path(kept), options.model, str(options.model)
        if model is None:
            model = folder / "model.onnx"
            _, name = write_model(model)
        with running(folder, model, options.threads) as place:
            steady = at_one_a_second(place, Path(scratch), folder, images, SYNTAXES[0])
            syntaxes = SYNTAXES[:1] if options.quick else SYNTAXES
            rates = {syntax: highest(place, Path(scratch), folder, syntax, window) for syntax in syntaxes}
    late = [step for step in STEPS if steady["since_success"][step]["p95"] >= BAR_S]
    result = {"model": name, "machine": before, "window_s": window, "one_a_second": steady, "highest": rates, "bar_s": BAR_S,
             "late": late}  # fmt: skip
    show(result)
    print(f"\nbar p95 < {BAR_S:g} s at 1 image a second:", f"missed by {', '.join(late)}" if late else "kept")
    results.write(options.out, result)


if __name__ == "__main__":
    main()
