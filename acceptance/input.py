"""The acceptance run on real images: Kermany images from dcmsend to an approved model, and a folder of odd files.

    python acceptance/input.py --data DIR [--images 1500] [--site DIR] [--cap N] [--quick] [--only loop|files]

DIR holds kermany224/ and dicom/ (public images, not part of the project). The run uses the product's own commands and
dcmtk's dcmsend, kills every process once, and exits 1 if a check fails. `--quick`: 300 images, profile demo.
Results: bench/results/real_input.json and .md; `--quick` prints only, unless --out names a file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acceptance import kinds, loop
from acceptance.record import Record
from acceptance.table import markdown
from bench.common import machine, results
from bench.common.appliance import ROOT, Failed, dcmtk

CAP = {"cpu": 500, "demo": 200}  # training images of a round; the profiles promise ten, or two, minutes for these


def main() -> int:
    """Run both parts; return 1 if a check failed or the run could not continue."""
    parser = results.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int)
    parser.add_argument("--site", type=Path, help="folder that keeps sites and wrapped images; default: temporary")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=("loop", "files"))
    parser.add_argument("--cap", type=int, help="most training images a round (learn.max_unlabelled)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="path of the results without .json")
    options = parser.parse_args()
    out = options.out or (None if options.quick else results.RESULTS / "real_input")
    for name in ("dcmsend", "echoscu"):
        dcmtk(name)
    with tempfile.TemporaryDirectory(prefix="real-input-") as scratch:
        root = (options.site or Path(scratch)).resolve()
        root.mkdir(parents=True, exist_ok=True)
        return _run(options, root, out)


def _run(options: argparse.Namespace, root: Path, out: Path | None) -> int:
    profile = "demo" if options.quick else "cpu"
    images = options.images or (300 if options.quick else 1500)
    cap = options.cap or CAP[profile]
    hidden = {str(root): "SITE", str(options.data.resolve()): "DIR", str(options.data): "DIR", str(ROOT): "REPO"}
    record = Record(hidden)
    chosen = [
        f"--images {images}",
        options.cap and f"--cap {cap}",
        options.quick and "--quick",
        options.only and f"--only {options.only}",
    ]
    words = [word for word in chosen if word]
    record.result["setup"] = {
        "command": " ".join(["python acceptance/input.py --data DIR", *words]),
        "images": images, "profile": profile, "cap": cap, "seed": options.seed, **machine.facts(), "load": f"load {machine.facts()['load']:.1f} at the start",
    }  # fmt: skip
    try:
        if options.only != "loop":
            kinds.run(options.data.resolve(), root, record)
        if options.only != "files":
            loop.run(options.data.resolve(), root, record, images, profile, cap, options.seed)
    except Failed as error:
        record.check("the run could continue", False, error)
    finally:
        _write(record, out)
    print(f"\n{len(record.checks)} checks, {len(record.broken)} broken", *record.broken, sep="; ")
    return 1 if record.broken else 0


def _write(record: Record, out: Path | None) -> None:
    setup = record.result["setup"]
    setup["seconds"] = round(time.monotonic() - record.began, 1)
    setup["load"] += f", {machine.facts()['load']:.1f} at the end"
    if out:
        record.write(out.with_suffix(".json"))
        page = record.clean(markdown(record.result, record.events, record.checks))
        out.with_suffix(".md").write_text(page, "utf-8")


if __name__ == "__main__":
    sys.exit(main())
