"""Knowledge distillation by strategy on real images, after Ho & Gwak's Table 1 but with seeds and paired differences.

Small networks from random weights on Kermany's images at 64 px: each seed draws 300 labelled and 700 unlabelled images
by patient from the train split, and every network is measured on the 338 test images. The phases are the product's own
(`learner/recipes/kd.py`); only the export is replaced by a measurement. A cell that stands in the results is skipped.
Says nothing of adults, of large networks or of pretrained ones.

    OMP_NUM_THREADS=1 python bench/learning/kd_strategies.py --data DIR [--folder DIR] [--out bench/results/kd_strategies.jsonl]

DIR holds kermany224/manifest.csv (file, patient_id, labels, split) and the pictures it names.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
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
    "balance": "none",  # as the committed cells were made
}  # fmt: skip
# strategy, the one of the recipe, whether the unlabelled images are there; a cell's base has the network that is served
ROWS = {
    "base": ("base", True), "base, teacher": ("base", True), "standard": ("standard", True), "self": ("self", True),
    "defective": ("defective", True), "reversed": ("reversed", True), "standard, labelled only": ("standard", False),
}  # fmt: skip
LAST = ("reversed", "standard, labelled only")  # the dearest and the least asked for: after the others
BASE_OF = {"reversed": "base, teacher"}


class Measured(Run):
    """A run whose exports are AUCs on test images."""

    test: list[Sample]
    aucs: dict[str, float]

    def export(self, name: str, state: State, serve: str, chosen: str | None = None, plan: Plan | None = None) -> None:
        scores = predict(self, state.student, self.test)[:, 0].numpy()
        self.aucs[name] = auc(scores, np.array([sample.labels[0] for sample in self.test], float))


def read_samples(folder: Path) -> list[Sample]:
    """Every image of the manifest, whose `plate` is still its picture; the `personNN` numbers restart with each split."""
    with (folder / "manifest.csv").open(newline="") as file:
        return [
            Sample(i, f"{row['split']}-{row['patient_id']}", folder / row["file"], row["split"],
                 (int("Pneumonia" in row["labels"].split("|")),))
            for i, row in enumerate(csv.DictReader(file))
        ]  # fmt: skip


def draw(samples: list[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """Labelled and unlabelled train images, whole patients in random order; no patient is in both."""
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
    """The picture as a plate, once."""
    path = plates / f"{sample.image}.npy"
    if not path.exists():
        np.save(path, np.asarray(Image.open(sample.plate).convert("L").resize(PLATE_SHAPE, Image.Resampling.BICUBIC)))
    return path


def measure(
    row: str, seed: int, work: Path, labelled: list[Sample], unlabelled: list[Sample], test: list[Sample]
) -> float:
    """AUC of the served network. Networks on labels alone are trained once a seed and lent to the other cells."""
    strategy, stream = ROWS[row]
    own, other = PAIR[::-1] if row == "base, teacher" else PAIR
    folder = work / f"{seed} {row}"
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    recipe = resolve("kd", "demo", {**RECIPE, "arch": own, "kd_teacher": other, "kd_strategy": strategy})
    samples = [(sample, [*sample.labels]) for sample in labelled] + [(sample, None) for sample in unlabelled if stream]
    write_json(folder / "manifest.json", {
        "version": 2, "round": row, "plate_version": 1, "findings": ["Pneumonia"], "recipe": recipe.to_dict(),
        "seed": seed, "plates": "../plates", "parent": None, "until": None,
        "images": [{"image": sample.image, "patient": sample.patient, "plate": f"{sample.image}.npy", "range": "train",
                   "labels": labels} for sample, labels in samples],
    })  # fmt: skip
    for phase, network in (("t0", own), ("teacher", other)):
        if (lent := work / f"{seed} {network}.safetensors").exists() and (phase, strategy) != ("teacher", "defective"):
            shutil.copy(lent, folder / "checkpoint" / f"{phase}.safetensors")
    run = Measured(load(folder))
    run.test, run.aucs = test, {}
    kd.train(run)
    run.progress.close()
    shutil.copy(folder / "checkpoint/t0.safetensors", work / f"{seed} {own}.safetensors")
    shutil.rmtree(folder / "shard", ignore_errors=True)
    return run.aucs["final"]


def floor_auc(labelled: list[Sample], test: list[Sample]) -> float:
    """Logistic regression on 24 x 24 raw pixels of the labelled images."""
    small = [
        pixel_baseline.thumbnails(np.stack([read_plate(sample.plate) for sample in part])) for part in (labelled, test)
    ]
    truth = [np.array([sample.labels for sample in part], float) for part in (labelled, test)]
    return auc(pixel_baseline.fit(small[0], truth[0]).scores(small[1])[:, 0], truth[1][:, 0])


def spread(values: list[float]) -> str:
    return f"{mean(values):+.3f} +- {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:+.3f}"


def show(lines: list[dict]) -> None:
    """Mean and deviation over seeds, and the paired difference to the same network on labels alone."""
    found = {(line["row"], line["seed"]): line["auc"] for line in lines}
    print(f"test AUC, {PAIR[0]} (student) and {PAIR[1]} (teacher); reversed serves the second")
    print(f"{'':26}{'AUC':>18}{'against its base':>20}  by seed")
    for row in ("floor", *ROWS):
        seeds = [seed for seed in range(SEEDS) if (row, seed) in found]
        if seeds:
            base = BASE_OF.get(row, "base")
            gains = [found[row, seed] - found[base, seed] for seed in seeds if (base, seed) in found]
            gain = "" if row == base or row in ("floor", "base, teacher") or not gains else spread(gains)
            each = " ".join(f"{found[row, seed]:.3f}" for seed in seeds)
            print(f"{row:26}{spread([found[row, seed] for seed in seeds])[1:]:>18}{gain:>20}  {each}")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--data", type=Path, required=True, help="holds kermany224/")
    ask.add_argument(
        "--folder", type=Path, help="plates and rounds stay here, so that a broken cell goes on; default: temporary"
    )
    ask.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[2] / "bench" / "results" / "kd_strategies.jsonl"
    )
    args = ask.parse_args()
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    there = {(line["row"], line["seed"]) for line in lines}
    warnings.simplefilter("ignore")  # random weights are meant here
    samples = read_samples(args.data / "kermany224")
    with contextlib.ExitStack() as stack:
        work = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (work / "plates").mkdir(parents=True, exist_ok=True)

        def plated(chosen: list[Sample]) -> list[Sample]:
            return [Sample(f.image, f.patient, write_plate(f, work / "plates"), f.range, f.labels) for f in chosen]

        order = [
            (row, seed) for last in (False, True) for seed in range(SEEDS) for row in ROWS if (row in LAST) == last
        ]
        for row, seed in [("floor", seed) for seed in range(SEEDS)] + order:
            if (row, seed) in there:
                continue
            begun = time.monotonic()
            labelled, unlabelled = (plated(part) for part in draw(samples, seed))
            test = plated([sample for sample in samples if sample.range == "test"])
            value = (
                floor_auc(labelled, test) if row == "floor" else measure(row, seed, work, labelled, unlabelled, test)
            )
            line = {"row": row, "seed": seed, "auc": round(value, 5), "seconds": round(time.monotonic() - begun, 1)}
            line |= {"positives": sum(sample.labels[0] or 0 for sample in labelled), "test": len(test)}
            lines.append(line)
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
    show(lines)


if __name__ == "__main__":
    main()
