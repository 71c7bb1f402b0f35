"""The gain of a demo round from unlabelled phantoms: AUC of T=0 and T=1 on new phantoms, over several seeds.

    python bench/learning/demo_recipe.py [--seeds 8] [--recipe distl] [--arms round "no stream" poisoned]

Runs real rounds (`python -m learner`) and scores the exported graphs with onnxruntime. Arms beside the round itself:
`no stream` (the same steps on the labelled images alone), `poisoned` (teacher logits inverted). Phantoms are easy, so
the table includes the raw-pixel floor.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnxruntime
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from agent.demo.pacs import FINDINGS, PREVALENCE, REPEAT, STRENGTH
from agent.demo.site import POISON, RECIPE
from agent.demo.story import LABELS as LABELLED
from bench.common import machine, results
from bench.common.appliance import ROOT
from dicom.phantom.phantom import draw
from dicom.phantom.wrap import wrap
from dicom.pixels.plate import to_plate
from learner.evaluation import pixel_baseline
from learner.evaluation.auc import auc
from learner.round.recipe import resolve

TRAIN, VALIDATION, CALIBRATION, TEST = 440, 60, 60, 400  # images; about as many for training as in `cxrloop demo`
ARMS = ("round", "no stream", "poisoned")
POISONS = {RECIPE: POISON, "evolve": {"poison_teacher": True, "label_weight": 0.0}}


def phantoms(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return plates uint8 [N, 512, 512] by the product's own pixel path, labels [N, F], patients."""
    drawn = draw(count, seed, FINDINGS, PREVALENCE, STRENGTH, repeat=REPEAT)
    plates = np.stack([to_plate(wrap(p.pixels(), p.patient, p.view)) for p in drawn])
    return plates, np.array([[p.labels[f] for f in FINDINGS] for p in drawn]), [p.patient for p in drawn]


def write_round(folder: Path, ranges: dict, seed: int, arm: str, name: str, overrides: dict) -> None:
    """Write a round folder as the agent does."""
    (folder / "plates").mkdir(parents=True)
    poison = POISONS[name] if arm == "poisoned" else {}
    recipe = resolve(name, "demo", {**overrides, **poison, "seed": seed})
    samples = []
    for range_, (plates, labels, patients) in ranges.items():
        for i in range(len(plates)):
            known = range_ != "train" or i < LABELLED
            if arm == "no stream" and not known:
                continue
            file = f"{range_}{i}.npy"
            np.save(folder / "plates" / file, plates[i])
            labelled = [int(v) for v in labels[i]] if known else None
            sample = {"image": len(samples), "patient": patients[i], "plate": file, "range": range_, "labels": labelled}
            samples.append(sample)
    if arm == "no stream":  # as many steps as with the stream
        steps = TRAIN // recipe.batch * recipe.epochs
        recipe = recipe.override({"epochs": round(steps / (LABELLED // recipe.batch))})
    manifest = {
        "version": 2, "round": "r0001", "plate_version": 1, "findings": list(FINDINGS), "recipe": recipe.to_dict(),
        "seed": seed, "plates": "plates", "parent": None, "until": None, "images": samples,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))


def measure(folder: Path, plates: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the AUC by finding, and their mean, of an exported model."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    scores = np.concatenate(
        [np.asarray(session.run(["logits"], {"plates": plates[i : i + 16]})[0]) for i in range(0, len(plates), 16)]
    )
    return by_finding(scores, labels)


def by_finding(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the AUC by finding, and their mean, of scores [N, F]."""
    each = {f: auc(scores[:, i], labels[:, i].astype(float)) for i, f in enumerate(FINDINGS)}
    return {"mean": float(np.mean(list(each.values()))), **each}


def run_seed(seed: int, arms: list[str], name: str, overrides: dict) -> dict:
    """Draw phantoms, train every arm in its own process, score on new phantoms; return the row."""
    sizes = {"train": TRAIN, "validation": VALIDATION, "calibration": CALIBRATION}
    ranges = {name: phantoms(count, 20000 * (i + 1) + seed) for i, (name, count) in enumerate(sizes.items())}
    plates, labels, _ = phantoms(TEST, 90000 + seed)
    train, truth = pixel_baseline.thumbnails(ranges["train"][0]), ranges["train"][1].astype(float)
    row: dict = {"seed": seed}
    for floor, count in ((f"floor, {LABELLED} labels", LABELLED), (f"floor, {TRAIN} labels", TRAIN)):
        row[floor] = by_finding(
            pixel_baseline.fit(train[:count], truth[:count]).scores(pixel_baseline.thumbnails(plates)), labels
        )
    for arm in arms:
        with tempfile.TemporaryDirectory() as temp:
            folder = Path(temp) / "r"
            write_round(folder, ranges, seed, arm, name, overrides)
            began, spent = time.monotonic(), machine.children_cpu_seconds()
            environment = os.environ | {"PYTHONWARNINGS": "ignore"}
            subprocess.run([sys.executable, "-m", "learner", str(folder)], cwd=ROOT, env=environment, check=True)
            row[f"{arm}: seconds"] = round(time.monotonic() - began, 1)
            row[f"{arm}: CPU seconds"] = round(machine.children_cpu_seconds() - spent, 1)
            row[f"{arm}: T=0"] = measure(folder / "t0", plates, labels)
            row[f"{arm}: T=1"] = measure(folder / "final", plates, labels)
    return row


def table(rows: list[dict]) -> str:
    """Return the table: one line for each model, mean AUC by seed, over seeds, and by finding."""
    names = [key for key in rows[0] if isinstance(rows[0][key], dict)]
    head = ["", *(f"seed {row['seed']}" for row in rows), "mean", *FINDINGS]
    lines = [f"{head[0]:24}" + "".join(f"{h:>13}" for h in head[1:])]
    for name in names:
        seeds = [row[name]["mean"] for row in rows]
        findings = [np.mean([row[name][f] for row in rows]) for f in FINDINGS]
        lines.append(f"{name:24}" + "".join(f"{v:13.3f}" for v in [*seeds, np.mean(seeds), *findings]))
    for name in [key for key in rows[0] if key.endswith("seconds")]:
        lines.append(f"{name:24}" + "".join(f"{row[name]:13.0f}" for row in rows))
    lines += [gain(rows, "round: T=1", before) for before in ("round: T=0", "no stream: T=1") if before in rows[0]]
    return "\n".join(lines)


def gain(rows: list[dict], model: str, before: str) -> str:
    """Return a line: mean AUC of one model minus another's, with its 95 % interval over seeds (Student's t)."""
    each = np.array([row[model]["mean"] - row[before]["mean"] for row in rows])
    if len(each) < 2:
        return f"{model} minus {before}: {each[0]:+.3f}"
    half = stats.t.ppf(0.975, len(each) - 1) * stats.sem(each)
    return f"{model} minus {before}: {each.mean():+.3f} [{each.mean() - half:+.3f}, {each.mean() + half:+.3f}]"


def main() -> None:
    """Run all seeds, print; write unless `--set` or `--first` changes the study."""
    parser = results.parser(__doc__, "demo_recipe.json")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--recipe", choices=list(POISONS), default=RECIPE, help="of the demo, or the default of a site")
    parser.add_argument("--threads", type=int, default=2, help="use 1 on a busy machine")
    parser.add_argument("--first", type=int, default=0, help="first seed; results are written for 0 only")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="recipe keys to try")
    options = parser.parse_args()
    tried = {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in options.set)}
    overrides = {"threads": options.threads, **tried}
    rows = []
    for seed in range(options.first, options.first + options.seeds):
        rows.append(run_seed(seed, options.arms, options.recipe, overrides))
        print(table(rows), flush=True)
        if not tried and options.first == 0:
            record(rows, options)


def record(rows: list[dict], options: argparse.Namespace) -> None:
    """Write the result file, which keeps the other recipe's rows; called after every seed."""
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    result = {recipe: before[recipe] for recipe in POISONS if recipe in before}
    phantoms_ = {
        "findings": FINDINGS, "prevalence": PREVALENCE, "strength": STRENGTH, "repeat": REPEAT, "labelled": LABELLED,
        "train": TRAIN, "validation": VALIDATION, "calibration": CALIBRATION, "test": TEST,
    }  # fmt: skip
    result[options.recipe] = {
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine.facts(), "threads": options.threads,
        "phantoms": phantoms_, "recipe": resolve(options.recipe, "demo").to_dict(), "rows": rows,
        "gains": [gain(rows, "round: T=1", other) for other in ("round: T=0", "no stream: T=1") if other in rows[0]],
    }  # fmt: skip
    results.write(options.out, result)


if __name__ == "__main__":
    main()
