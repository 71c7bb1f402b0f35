"""The acceptance run on real images: Kermany images from dcmsend to a promoted model, and a folder of odd files.

    python acceptance/input.py --data DIR [--images 1500] [--site DIR] [--cap N] [--quick] [--only loop|files]

DIR holds kermany224/ and dicom/ (public images, not part of the project). It uses the product's own commands and
dcmtk's dcmsend, kills every process once, and exits 1 when a check fails. `--quick`: 300 images, profile demo.
Results: bench/results/real_input.json and .md (`--quick`: only printed, unless --out says where).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acceptance import kinds, loop
from acceptance.driver import Failed, dcmtk
from acceptance.record import Record
from acceptance.table import markdown

CAP = {"cpu": 500, "demo": 200}  # training images of a round: what the profile promises to do in ten, or two, minutes


def main() -> int:
    """Run it; 1 when a check failed or the run could not go on."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--data", type=Path, required=True)
    ask.add_argument("--images", type=int)
    ask.add_argument(
        "--site", type=Path, help="where sites and wrapped images go, and stay; by default a temporary folder"
    )
    ask.add_argument("--quick", action="store_true")
    ask.add_argument("--only", choices=("loop", "files"))
    ask.add_argument("--cap", type=int, help="most training images a round (learn.max_unlabelled)")
    ask.add_argument("--seed", type=int, default=1)
    ask.add_argument("--out", type=Path, help="path of the results, without .json")
    args = ask.parse_args()
    out = args.out or (None if args.quick else Path(__file__).resolve().parents[1] / "bench" / "results" / "real_input")
    for name in ("dcmsend", "echoscu"):
        dcmtk(name)
    with tempfile.TemporaryDirectory(prefix="real-input-") as scratch:
        root = (args.site or Path(scratch)).resolve()
        root.mkdir(parents=True, exist_ok=True)
        return _run(args, root, out)


def _run(args: argparse.Namespace, root: Path, out: Path | None) -> int:
    profile = "demo" if args.quick else "cpu"
    images = args.images or (300 if args.quick else 1500)
    cap = args.cap or CAP[profile]
    repo = str(Path(__file__).resolve().parents[1])
    record = Record({str(root): "SITE", str(args.data.resolve()): "DIR", str(args.data): "DIR", repo: "REPO"})
    chosen = [
        f"--images {images}",
        args.cap and f"--cap {cap}",
        args.quick and "--quick",
        args.only and f"--only {args.only}",
    ]
    options = [option for option in chosen if option]
    record.result["setup"] = {
        "command": " ".join(["python acceptance/input.py --data DIR", *options]),
        "images": images, "profile": profile, "cap": cap, "seed": args.seed, "cores": os.cpu_count(),
        "load": f"load {os.getloadavg()[0]:.1f} at the start", "python": sys.version.split()[0],
    }  # fmt: skip
    try:
        if args.only != "loop":
            kinds.run(args.data.resolve(), root, record)
        if args.only != "files":
            loop.run(args.data.resolve(), root, record, images, profile, cap, args.seed)
    except Failed as error:
        record.check("the run could go on", False, error)
    finally:
        _written(record, out)
    print(f"\n{len(record.checks)} checks, {len(record.broken)} broken", *record.broken, sep="; ")
    return 1 if record.broken else 0


def _written(record: Record, out: Path | None) -> None:
    setup = record.result["setup"]
    setup["seconds"] = round(time.monotonic() - record.began, 1)
    setup["load"] += f", {os.getloadavg()[0]:.1f} at the end"
    if out:
        record.write(out.with_suffix(".json"))
        page = record.clean(markdown(record.result, record.events, record.checks))
        out.with_suffix(".md").write_text(page, "utf-8")


if __name__ == "__main__":
    sys.exit(main())
