"""Disk space of a year of nightly rounds, with and without `retention.rounds`.

The network of the recipe is built at the profile; its training state, checkpoints and ONNX file are written once and
measured. So is a manifest with `learn.max_unlabelled` images. What a step writes into the log is measured in one small
round (profile demo, phantoms). A year has 365 nights; each makes a candidate, and each planned evaluation passes at most one.
Store and ledger are not counted.

    python bench/nights/year_of_rounds.py [--recipe NAME] [--profile gpu] [--out bench/results/year_of_rounds.json]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from agent.rounds.tidying import KEPT
from agent.site.settings import GateKeys, LearnKeys, RetentionKeys
from bench.common import machine, results
from bench.common.appliance import ROOT
from bench.learning.cpu_rounds import FINDINGS, write_plates
from learner.engine import checkpoint
from learner.round.manifest import load, write_manifest
from learner.round.recipe import Recipe, resolve
from learner.training.export import ServedModel, export_onnx
from learner.training.run import Run

NIGHTS, LABELLED, SMALL = 365, 1000, 60
DEVICE_NAME = "pool: device Manufacturer Model Name"


def small_round(folder: Path, recipe: str) -> dict[str, float]:
    """Run a small round; return the bytes of a step in metrics.jsonl and of the other evidence, manifest not counted."""
    plates = folder / "plates"
    plates.mkdir()
    rows = write_plates(plates, SMALL)
    made = folder / "r0001"
    made.mkdir()
    overrides = {"t0_epochs": 2, "epochs": 2}
    write_manifest(
        made, findings=FINDINGS, recipe=resolve(recipe, "demo", overrides), seed=1, plates="../plates", parent=None,
        images=rows,
    )  # fmt: skip
    with (made / "learner.log").open("w") as log:
        subprocess.run([sys.executable, "-m", "learner", str(made)], cwd=ROOT, stdout=log, stderr=log, check=True)
    lines = (made / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    counted = {"manifest.json", "metrics.jsonl", "t0", "final"}
    other = sum(path.stat().st_size for path in made.iterdir() if path.name in KEPT - counted)
    other += sum((made / "final" / name).stat().st_size for name in ("card.json", "thresholds.json"))
    return {"step": sum(map(len, lines)) / len(lines), "other": other}


def manifest_bytes(folder: Path, recipe: Recipe, images: int) -> int:
    """Return the size of a manifest with so many unlabelled images and LABELLED labelled ones, as the agent writes it."""
    rows = [
        {
            "image": 100_000 + i, "patient": f"p{i:016x}", "plate": f"plates/00/{i:064x}.npy", "range": "train",
            "labels": [1 if i < LABELLED else None] * len(FINDINGS), "why": "labelled" if i < LABELLED else DEVICE_NAME,
        }
        for i in range(images + LABELLED)
    ]  # fmt: skip
    (folder / "large").mkdir()
    write_manifest(
        folder / "large", findings=FINDINGS, recipe=recipe, seed=1, plates="../../store", parent=None, images=rows
    )
    return (folder / "large" / "manifest.json").stat().st_size


def network_bytes(folder: Path, recipe: Recipe) -> dict[str, int]:
    """Return the sizes of a training state, of all checkpoints of a later round, and of the served ONNX file."""
    (folder / "network").mkdir()
    row = {"image": 1, "patient": "p", "plate": "1.npy", "range": "train", "labels": [1] * len(FINDINGS)}
    write_manifest(
        folder / "network", findings=FINDINGS, recipe=recipe, seed=1, plates="../plates", parent=None, images=[row]
    )
    run = Run(load(folder / "network"))
    state = run.new_state("distil", run.schedule(run.unlabelled_feed(), 1, recipe.lr))
    checkpoint.save_weights(folder / "weights.safetensors", state, run.plan, FINDINGS)
    for parameter in state.student.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    state.optimiser.step()  # the moments that a checkpoint holds
    checkpoint.save_state(folder / "state.safetensors", state, {"plan": run.plan})
    run.progress.close()
    export_onnx(ServedModel(state.student, run.plan, run.recipe).eval(), folder / "model.onnx")
    weights, saved, onnx = (
        (folder / name).stat().st_size for name in ("weights.safetensors", "state.safetensors", "model.onnx")
    )
    return {"training state": weights, "checkpoints": weights + saved, "onnx": onnx}


def main() -> None:
    """Measure the parts, add up the year, print and write."""
    arguments = results.parser(__doc__, "year_of_rounds.json")
    learn, gate, retention = (
        {name: field.default for name, field in keys.model_fields.items()}
        for keys in (LearnKeys, GateKeys, RetentionKeys)
    )
    arguments.add_argument("--recipe", default=learn["recipe"])
    arguments.add_argument("--profile", default="gpu")
    options = arguments.parse_args()
    recipe = resolve(options.recipe, options.profile, {"device": "cpu"})
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        small = small_round(folder, options.recipe)
        parts = network_bytes(folder, recipe)
        manifest = manifest_bytes(folder, recipe, learn["max_unlabelled"])
    steps = recipe.epochs * (learn["max_unlabelled"] // recipe.batch)
    evidence = round(manifest + steps * small["step"] + small["other"])
    states = min(NIGHTS, retention["rounds"] + gate["evaluations_per_year"] + 1)  # the baseline's, too
    gb = {
        "evidence": NIGHTS * evidence / 1e9,
        "training states": states * parts["training state"] / 1e9,
        "sealed bundles": NIGHTS * parts["onnx"] / 1e9,
    }
    untidied = evidence + parts["training state"] + parts["checkpoints"] + parts["onnx"]
    document = {
        "machine": machine.facts("torch"), "recipe": options.recipe, "profile": options.profile, "nights": NIGHTS,
        "images in a round": learn["max_unlabelled"], "steps of a round": steps, "states kept": states,
        "mb of a round": {"evidence": round(evidence / 1e6, 1)} | {k: round(v / 1e6, 1) for k, v in parts.items()},
        "gb of a year": {name: round(value, 1) for name, value in gb.items()},
        "gb of a year, rounds and models": round(sum(gb.values()), 1),
        "gb of a year without tidying": round(NIGHTS * (untidied + parts["onnx"]) / 1e9, 1),
    }  # fmt: skip
    results.write(options.out, document)
    print(document)


if __name__ == "__main__":
    main()
