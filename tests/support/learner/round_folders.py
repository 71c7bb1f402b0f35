"""Round folders for the learner's tests: plates with squares as findings, and a network that trains in seconds."""

import json
from pathlib import Path

import numpy as np

from learner.round.recipe import resolve

FINDINGS = ("effusion", "mass")
TINY = {
    "arch": "vit_tiny_patch8_depth1", "image_size": 32, "local_size": 16, "local_views": 2, "prototypes": 32,
    "head_hidden": 16, "bottleneck": 8, "class_hidden": 16, "batch": 4, "epochs": 2, "t0_epochs": 2, "threads": 1,
    "correct_every": 2, "correct_loss": "mix", "correct_first": False, "lam": 0.5, "pool": "cls", "init": "timm", "t0_lr": 1e-3, "lr": 1e-3, "device": "cpu", "drop_path": 0.1,
}  # fmt: skip
SMALL = {**TINY, "class_hidden": 0, "pool": "both", "neighbours": 3, "components": 4, "epochs": 1, "t0_epochs": 1}
GRAPH = {"blend": False, "targets": "teacher", "refit": "graph", "label_weight": 1.0}  # of `evolve`
ALL = {  # all losses, with frozen blocks
    "arch": "vit_tiny_patch8_depth2", "frozen_blocks": 1, "cached_views": 2, "ibot": 0.5, "koleo": 0.1, "agree": "heads",
    "thresholds": True, "average": "all", "lam": 1.0, "targets": "graph", "replay": 0.25,
}  # fmt: skip


def xray(labels, seed):
    """Return a plate, uint8 [512, 512]: noise, and one bright square for each positive label."""
    rng = np.random.default_rng(seed)
    plate = rng.normal(100, 20, (512, 512))
    for i, value in enumerate(labels):
        if value:
            plate[96 : 96 + 160, 64 + 224 * i : 64 + 224 * i + 160] += 80
    return np.clip(plate, 0, 255).astype(np.uint8)


def make_round(folder, train=(6, 8), validation=6, calibration=12, parent=None, until=None, seed=3, **overrides):
    """Write plates and manifest and return the folder; `train`: numbers of images with and without labels."""
    folder = Path(folder)
    (folder / "plates").mkdir(parents=True)
    samples, rng = [], np.random.default_rng(seed)
    counts = [("train", train[0], True), ("train", train[1], False), ("validation", validation, True)]
    for range_, count, labelled in [*counts, ("calibration", calibration, True)]:
        for i in range(count):
            labels = [int(v) for v in rng.integers(0, 2, len(FINDINGS))]
            labels = [1, 0] if i == 0 else [0, 1] if i == 1 else labels
            image = len(samples)
            np.save(folder / "plates" / f"{image}.npy", xray(labels, [seed, image]))
            samples.append(
                {"image": image, "patient": f"p{image}", "plate": f"{image}.npy", "range": range_,
                 "labels": labels if labelled else [None] * len(FINDINGS), "why": None}
            )  # fmt: skip
    manifest = {
        "version": 3, "round": "r0001", "plate_version": 1, "findings": list(FINDINGS),
        "recipe": resolve("distl", "demo", {**TINY, **overrides}).to_dict(), "seed": seed,
        "plates": "plates", "parent": parent, "until": until, "notes": [], "images": samples,
    }  # fmt: skip
    write_manifest(folder, manifest)
    return folder


def read_manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def write_manifest(folder, manifest):
    (folder / "manifest.json").write_text(json.dumps(manifest))


def result(folder):
    return json.loads((folder / "result.json").read_text())


def card(folder, name="final"):
    return json.loads((folder / name / "card.json").read_text())


def make(folder, method="evolve", samples=None, **overrides):
    """Write a round folder with a small recipe and return it; `samples`: keywords of `make_round`.

    `evolve` has the network alone, with a graph, and no blend: see GRAPH.
    """
    folder = make_round(folder, **(samples or {}))
    recipe = resolve(method, "demo", {**SMALL, **(GRAPH if method == "evolve" else {}), **overrides})
    write_manifest(folder, read_manifest(folder) | {"recipe": recipe.to_dict()})
    return folder
