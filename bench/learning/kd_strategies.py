"""Knowledge distillation by strategy on real images, after Table 1 of Ho & Gwak, with seeds and paired differences.

Small networks from random weights on Kermany's images at 64 px. Each seed draws 300 labelled and 700 unlabelled images
by patient from the train split; every network is measured on the 338 test images. The phases are the product's own
(`learner/recipes/kd.py`); a measurement replaces the export. A cell that is in the results is skipped. It does not cover
adults, large networks or pretrained networks.

    OMP_NUM_THREADS=1 python bench/learning/kd_strategies.py --data DIR [--folder DIR] [--rows base self] [--out FILE.jsonl]

DIR holds kermany224/.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.common import results
from bench.common.public_images import read_set
from cxrloop.durable import write_json
from cxrloop.plate import PLATE_SHAPE
from learner.data.plates import read_plate
from learner.engine.step import State
from learner.evaluation import pixel_baseline
from learner.evaluation.auc import auc
from learner.networks.architecture import Plan
from learner.recipes import kd
from learner.recipes.pseudo_label import predict
from learner.round.manifest import Sample, load
from learner.round.recipe import resolve
from learner.training.run import Run

LABELLED, UNLABELLED, SEEDS = 300, 700, 3
PAIR = ("mobilenetv3_small_050", "resnet18")  # .6 and 11 million weights
RECIPE = {
    "image_size": 64, "epochs": 8, "t0_epochs": 8, "lr": 1e-3, "t0_lr": 1e-3, "threads": 1, "clip": 3.0,
    "balance": "none",  # as in the committed results
}  # fmt: skip
# row: (strategy of the recipe, whether the unlabelled images are used); a row's base serves the same network
ROWS = {
    "base": ("base", True), "base, teacher": ("base", True), "standard": ("standard", True), "self": ("self", True),
    "defective": ("defective", True), "reversed": ("reversed", True), "standard, labelled only": ("standard", False),
}  # fmt: skip
LAST = ("reversed", "standard, labelled only")  # the slowest rows run last
BASE_OF = {"reversed": "base, teacher"}


class Measured(Run):
    """A run that measures AUC on test images in place of each export."""

    test: list[Sample]
    aucs: dict[str, float]

    def export(self, name: str, state: State, serve: str, chosen: str | None = None, plan: Plan | None = None) -> None:
        scores = predict(self, state.student, self.test)[:, 0].numpy()
        self.aucs[name] = auc(scores, np.array([sample.labels[0] for sample in self.test], float))


def read_samples(folder: Path) -> list[Sample]:
    """Return every image of the set; `plate` is its picture for now."""
    return [
        Sample(i, image.patient, image.picture, image.split, (image.has("Pneumonia"),))
        for i, image in enumerate(read_set(folder))
    ]


def draw(samples: list[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """Return labelled and unlabelled train images, by whole patients in random order; no patient is in both."""
    by_patient: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.range == "train":
            by_patient.setdefault(sample.patient, []).append(sample)
    patients = sorted(by_patient)
    random.Random(seed).shuffle(patients)
    chosen: tuple[list[Sample], list[Sample]] = ([], [])
    for patient in patients:
        part = 0 if len(chosen[0]) < LABELLED else 1
        chosen[part].extend(by_patient[patient])
    return chosen[0][:LABELLED], chosen[1][:UNLABELLED]


def write_plate(sample: Sample, plates: Path) -> Path:
    """Write the picture as a plate unless it exists; return its path."""
    path = plates / f"{sample.image}.npy"
    if not path.exists():
        np.save(path, np.asarray(Image.open(sample.plate).convert("L").resize(PLATE_SHAPE, Image.Resampling.BICUBIC)))
    return path


def measure(
    row: str, seed: int, work: Path, labelled: list[Sample], unlabelled: list[Sample], test: list[Sample]
) -> float:
    """Return the AUC of the served network. Networks trained on labels alone are shared between the cells of a seed."""
    strategy, stream = ROWS[row]
    served, second = PAIR[::-1] if row == "base, teacher" else PAIR
    folder = work / f"{seed} {row}"
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    recipe = resolve("kd", "demo", {**RECIPE, "arch": served, "kd_teacher": second, "kd_strategy": strategy})
    samples = [(sample, [*sample.labels]) for sample in labelled] + [(sample, None) for sample in unlabelled if stream]
    write_json(folder / "manifest.json", {
        "version": 2, "round": row, "plate_version": 1, "findings": ["Pneumonia"], "recipe": recipe.to_dict(),
        "seed": seed, "plates": "../plates", "parent": None, "until": None,
        "images": [{"image": sample.image, "patient": sample.patient, "plate": f"{sample.image}.npy", "range": "train",
                   "labels": labels} for sample, labels in samples],
    })  # fmt: skip
    for phase, network in (("t0", served), ("teacher", second)):
        if (shared := work / f"{seed} {network}.safetensors").exists() and (phase, strategy) != (
            "teacher",
            "defective",
        ):
            shutil.copy(shared, folder / "checkpoint" / f"{phase}.safetensors")
    run = Measured(load(folder))
    run.test, run.aucs = test, {}
    kd.train(run)
    run.progress.close()
    shutil.copy(folder / "checkpoint/t0.safetensors", work / f"{seed} {served}.safetensors")
    shutil.rmtree(folder / "shard", ignore_errors=True)
    return run.aucs["final"]


def floor_auc(labelled: list[Sample], test: list[Sample]) -> float:
    """Return the AUC of a logistic regression on 24 x 24 raw pixels of the labelled images."""
    small = [
        pixel_baseline.thumbnails(np.stack([read_plate(sample.plate) for sample in part])) for part in (labelled, test)
    ]
    truth = [np.array([sample.labels for sample in part], float) for part in (labelled, test)]
    return auc(pixel_baseline.fit(small[0], truth[0]).scores(small[1])[:, 0], truth[1][:, 0])


def spread(values: list[float]) -> str:
    """Return mean and standard deviation as text."""
    return f"{mean(values):+.3f} +- {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:+.3f}"


def show(lines: list[dict]) -> None:
    """Print mean and deviation over seeds, and the paired difference to the same network on labels alone."""
    aucs = {(line["row"], line["seed"]): line["auc"] for line in lines}
    print(f"test AUC, {PAIR[0]} (student) and {PAIR[1]} (teacher); reversed serves the second")
    print(f"{'':26}{'AUC':>18}{'against its base':>20}  by seed")
    for row in ("floor", *ROWS):
        seeds = [seed for seed in range(SEEDS) if (row, seed) in aucs]
        if seeds:
            base = BASE_OF.get(row, "base")
            gains = [aucs[row, seed] - aucs[base, seed] for seed in seeds if (base, seed) in aucs]
            gain = "" if row == base or row in ("floor", "base, teacher") or not gains else spread(gains)
            by_seed = " ".join(f"{aucs[row, seed]:.3f}" for seed in seeds)
            print(f"{row:26}{spread([aucs[row, seed] for seed in seeds])[1:]:>18}{gain:>20}  {by_seed}")


def main() -> None:
    """Run the cells that are missing in the results, then print the table."""
    parser = results.parser(__doc__, "kd_strategies.jsonl")
    parser.add_argument("--data", type=Path, required=True, help="holds kermany224/")
    parser.add_argument("--folder", type=Path, help="keeps plates and rounds to resume a cell; default: temporary")
    parser.add_argument("--rows", nargs="+", choices=["floor", *ROWS], default=["floor", *ROWS])
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    finished = {(line["row"], line["seed"]) for line in lines}
    warnings.simplefilter("ignore")  # random weights are intended here
    samples = read_samples(options.data / "kermany224")
    with contextlib.ExitStack() as stack:
        work = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (work / "plates").mkdir(parents=True, exist_ok=True)

        def plated(chosen: list[Sample]) -> list[Sample]:
            return [Sample(f.image, f.patient, write_plate(f, work / "plates"), f.range, f.labels) for f in chosen]

        order = [
            (row, seed) for last in (False, True) for seed in range(SEEDS) for row in ROWS if (row in LAST) == last
        ]
        for row, seed in [("floor", seed) for seed in range(SEEDS)] + order:
            if (row, seed) in finished or row not in options.rows:
                continue
            began = time.monotonic()
            labelled, unlabelled = (plated(part) for part in draw(samples, seed))
            test = plated([sample for sample in samples if sample.range == "test"])
            value = (
                floor_auc(labelled, test) if row == "floor" else measure(row, seed, work, labelled, unlabelled, test)
            )
            line = {"row": row, "seed": seed, "auc": round(value, 5), "seconds": round(time.monotonic() - began, 1)}
            line |= {"positives": sum(sample.labels[0] or 0 for sample in labelled), "test": len(test)}
            lines.append(line)
            with options.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
    show(lines)


if __name__ == "__main__":
    main()
