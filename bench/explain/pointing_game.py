"""Agreement of saliency maps with radiologists' boxes on adults: pointing game, share of the map in the box, overlap.

    python bench/explain/pointing_game.py --data DIR --backbone FILE [--pools both mean cls] [--methods ...]

`DIR/nih_adult512/manifest.csv` has boxes (column `boxes`: finding:x:y:w:h in pixels of the 1024 px original). The network
is a pretrained backbone at 224 px with a linear head, fitted to the labels of all patients without a box. Every map is
reduced to the patch grid of the served heatmap (the mean of each patch), in two ways: evidence for the finding only, and
either sign (for the served heatmap also: what exceeds its mean). A case is an image with a finding; its boxes are one region. Compared are a flat map, a Gaussian at the
image's centre, and the finding's usual place (the boxes of other patients). Intervals: 2,000 draws of patients.
26 boxes are pneumonia; the other findings are pooled and descriptive only.
"""

import argparse
import json
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.common import machine, results
from bench.common.public_images import PublicImage, read_plate, read_set
from bench.explain.saliency import ALL, SIDE, draw_map, to_images
from learner.data.augment import normalise
from learner.errors import LearnerError
from learner.evaluation.auc import auc
from learner.fits import logistic
from learner.fits.head_refit import FEW_PENALTY
from learner.networks.backbone import Backbone
from learner.networks.heads import Network, make_network
from learner.pretrained.reader import read_pretrained
from learner.round.recipe import Recipe, resolve
from learner.training.head_fit import set_head

MAIN = "Pneumonia"  # the only finding with enough boxes for a statement
DRAWS = 2000
FOLDS = 5  # by patient, for the AUC of the head
SPREAD = 0.25  # standard deviation of the centre prior, as a share of the image's side
FLAT, CENTRE, USUAL, SERVED = "(flat map)", "(centre of the image)", "(usual place of the finding)", "heatmap"
UNSIGNED = ("attention", "rollout")
STEPS = 20  # of an integral: enough for means over patches, where `explain` takes 50 and more for single pixels
MEASURES = {"pointing": "peak in the box", "mass": "share of the map in the box", "iou": "overlap at the box's area"}

Rows = dict[str, list[dict[str, float]]]  # by map, the measures of each case


@dataclass(frozen=True)
class Case:
    """One image with one finding that has boxes; `region` is bool [512, 512], the union of its boxes."""

    image: int
    patient: str
    finding: str
    region: np.ndarray


def read_cases(images: list[PublicImage]) -> list[Case]:
    """Return the cases of all images with boxes; ValueError for a box outside the image."""
    cases = []
    for number, image in enumerate(images):
        regions: dict[str, np.ndarray] = {}
        for text in filter(None, image.boxes.split("|")):
            finding, *numbers = text.split(":")
            x, y, wide, high = (round(int(value) * SIDE / 1024) for value in numbers)
            if min(x, y) < 0 or x + wide > SIDE or y + high > SIDE:
                raise ValueError(f"{image.picture.name}: box {text} leaves the image of 1024 x 1024 px")
            regions.setdefault(finding, np.zeros((SIDE, SIDE), bool))[y : y + high, x : x + wide] = True
        cases += [Case(number, image.patient_id, finding, region) for finding, region in regions.items()]
    return cases


def make_networks(backbone: Path, pools: list[str]) -> dict[str, tuple[Network, Recipe]]:
    """Return a network without a fitted head for each pool, with the recipe's sizes."""
    read = read_pretrained(backbone).require_whole(str(backbone))
    assert read.tensors is not None
    made = {}
    for pool in pools:
        recipe = resolve(
            "evolve",
            "gpu",
            {"image_size": 224, "local_size": 112, "pool": pool, "blocks": 0, "backbone": str(backbone)},
        )
        network = make_network(read.plan, recipe, 1)
        network.backbone.load(read.tensors)
        made[pool] = network.eval().requires_grad_(False), recipe
    return made


def embed(network: Network, recipe: Recipe, plates: torch.Tensor) -> torch.Tensor:
    """Return embeddings (N, D) of plates uint8 [N, 512, 512]."""
    with torch.no_grad():
        return torch.cat(
            [network.backbone(normalise(part, recipe)) for part in to_images(plates, recipe).split(16)]
        ).float()


def fit_head(
    network: Network, seen: torch.Tensor, images: list[PublicImage], cases: list[Case]
) -> tuple[list[str], dict[str, float]]:
    """Fit the head to all images of patients without a box; return the findings, and the AUC of `FOLDS` folds by patient."""
    findings = sorted({case.finding for case in cases})
    places = [i for i, image in enumerate(images) if image.patient_id not in {case.patient for case in cases}]
    labels = torch.tensor([[float(images[i].has(finding)) for finding in findings] for i in places])
    head = logistic.fit(seen[places], labels, FEW_PENALTY)
    network.cls_head = type(network.cls_head)(network.backbone.dim, len(findings), 0).eval().requires_grad_(False)
    set_head(network, head)
    patients = sorted({images[i].patient_id for i in places})
    fold_of = dict(zip(np.random.default_rng(0).permutation(patients), np.arange(len(patients)) % FOLDS, strict=True))
    folds, logits = np.array([fold_of[images[i].patient_id] for i in places]), np.zeros(labels.shape)
    for fold in range(FOLDS):
        inside = torch.from_numpy(folds == fold)
        logits[folds == fold] = logistic.fit(seen[places][~inside], labels[~inside], FEW_PENALTY)(seen[places][inside])
    return findings, {f: round(auc(logits[:, i], labels[:, i].numpy()), 3) for i, f in enumerate(findings)}


def on_grid(made: torch.Tensor, grid: int) -> np.ndarray:
    """Return a map (1, 1, h, w) as the mean of each patch, signed float64 [grid, grid]."""
    return torch.nn.functional.adaptive_avg_pool2d(made, grid)[0, 0].double().numpy()


def score(made: np.ndarray, region: np.ndarray) -> dict[str, float]:
    """Return the measures of a non-negative map [g, g] against a region bool [512, 512]; all 0 for an empty map."""
    if made.max() <= 0:
        return dict.fromkeys(MEASURES, 0.0)
    large = np.asarray(Image.fromarray(made.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    step = SIDE / made.shape[0]
    peaks = np.argwhere(made == made.max())  # a flat map has many peaks: the share of them counts
    hits = [region[int((row + 0.5) * step), int((column + 0.5) * step)] for row, column in peaks]
    top = np.zeros(SIDE * SIDE, bool)
    top[np.argsort(-large, axis=None, kind="stable")[: region.sum()]] = True
    shared = float((top & region.ravel()).sum())
    return {
        "pointing": float(np.mean(hits)),
        "mass": float(large[region].sum() / large.sum()),
        "iou": shared / float((top | region.ravel()).sum()),
    }


def priors(cases: list[Case], grid: int) -> Rows:
    """Return the measures of the maps that use no network."""
    axis = (np.arange(grid) + 0.5) / grid - 0.5
    centre = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * SPREAD**2))
    flat = [float(case.region.mean()) for case in cases]  # a random place: area a; overlap of two regions of that area
    rows: Rows = {
        FLAT: [{"pointing": a, "mass": a, "iou": a / (2 - a)} for a in flat],
        CENTRE: [score(centre, case.region) for case in cases],
        USUAL: [],
    }
    for case in cases:
        others = [c for c in cases if c.patient != case.patient and c.finding == case.finding]
        mean = np.mean([c.region for c in others or cases if c.patient != case.patient], axis=0)
        rows[USUAL].append(score(mean.reshape(grid, SIDE // grid, grid, SIDE // grid).mean((1, 3)), case.region))
    return rows


def measure(
    network: Network, recipe: Recipe, images: torch.Tensor, cases: list[Case], found: list[int], method: str
) -> Rows:
    """Return the measures of a method by case: under its name, and for signed maps also in other ways.

    images (N, 1, S, S) and `found`, the places of the findings in the head, belong to the N cases. Raises LearnerError for
    a method that the network does not have.
    """
    grid = recipe.image_size // network.backbone.patch
    maps = [draw_map(network, recipe, images[i : i + 1], finding, method, STEPS) for i, finding in enumerate(found)]
    signed = [on_grid(made, grid) for made in maps]
    ways = {method: signed}
    if method not in UNSIGNED:
        ways[f"{method}, either sign"] = [on_grid(made.abs(), grid) for made in maps]
    if method == SERVED:
        ways[f"{method}, above its mean"] = [made - made.mean() for made in signed]
    return {
        name: [score(made.clip(min=0), case.region) for made, case in zip(drawn, cases, strict=True)]
        for name, drawn in ways.items()
    }


def summary(rows: Rows, patients: list[str], chosen: np.ndarray) -> dict[str, dict]:
    """Return the mean of each measure over the chosen cases, with intervals, alone and minus centre prior and heatmap."""
    names, who = np.unique([patients[i] for i in chosen], return_inverse=True)
    rng = np.random.default_rng(0)
    weights = np.stack(
        [np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))[who] for _ in range(DRAWS)]
    )
    values = {name: {m: np.array([per[i][m] for i in chosen]) for m in MEASURES} for name, per in rows.items()}

    def estimate(v: np.ndarray) -> list[float]:
        drawn = weights @ v / weights.sum(1)
        return [round(float(x), 4) for x in (v.mean(), *np.percentile(drawn, [2.5, 97.5]))]

    table = {}
    for name, own in values.items():
        table[name] = {m: estimate(own[m]) for m in MEASURES}
        for label, reference in (("minus centre", CENTRE), ("minus heatmap", SERVED)):
            if reference in values and name != reference:
                table[name][label] = {m: estimate(own[m] - values[reference][m]) for m in MEASURES}
    return table


def as_text(table: dict[str, dict]) -> str:
    """Return a table in Markdown: mean [95 % interval] of each measure, and the share in the box minus the centre's."""
    lines = [f"| map | {' | '.join(MEASURES.values())} | share, minus the centre |", "|---" * (len(MEASURES) + 2) + "|"]
    for name, row in table.items():
        cells = [f"{row[m][0]:.2f} [{row[m][1]:.2f}, {row[m][2]:.2f}]" for m in MEASURES]
        apart = row.get("minus centre", {}).get("mass")
        cells.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(*apart) if apart else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_figure(table: dict[str, dict], title: str, path: Path) -> None:
    """Draw the measures of each method on the main finding, with intervals; one column a measure."""
    names = sorted(table, key=lambda name: table[name]["mass"][0])
    figure, axes = plt.subplots(
        1, len(MEASURES), figsize=(11, 0.27 * len(names) + 1.4), sharey=True, layout="constrained"
    )
    for axis, (m, heading) in zip(axes, MEASURES.items(), strict=True):
        for place, name in enumerate(names):
            value, low, high = table[name][m]
            colour = "#6b6b6b" if name.startswith("(") else "#b3261e" if name == SERVED else "#1f4e79"
            axis.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color=colour, capsize=2, ms=4)
        axis.axvline(table[CENTRE][m][0], color="#6b6b6b", lw=0.8, ls=":")
        axis.set_title(heading, loc="left", fontsize=10)
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(
        range(len(names)), [f"{name} (served)" if name == SERVED else name for name in names], fontsize=8
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run(options: argparse.Namespace) -> None:
    """Measure every pool and method that the result file lacks; the file is written after each."""
    torch.set_num_threads(options.threads)
    images = read_set(options.data / "nih_adult512")
    cases = read_cases(images)
    plates = torch.from_numpy(np.stack([read_plate(image.picture) for image in images]))
    document: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"pools": {}}
    document |= {"machine": machine.facts("torch", "timm", backbone=options.backbone.name, steps=STEPS)}
    document |= {"cases": [{"patient": case.patient, "finding": case.finding} for case in cases]}
    for pool, (network, recipe) in make_networks(options.backbone, options.pools).items():
        findings, quality = fit_head(network, embed(network, recipe, plates), images, cases)
        assert isinstance(network.backbone, Backbone)
        result = document["pools"].setdefault(pool, {"rows": {}, "refused": {}}) | {"auc": quality}
        document["pools"][pool] = result
        result["rows"] |= priors(cases, recipe.image_size // network.backbone.patch)
        seen = to_images(torch.stack([plates[case.image] for case in cases]), recipe)
        for method in (m for m in options.methods if m not in result["rows"]):
            began = time.monotonic()
            try:
                result["rows"] |= measure(
                    network, recipe, seen, cases, [findings.index(c.finding) for c in cases], method
                )
            except LearnerError as error:
                result["refused"][method] = str(error)
            results.write(options.out, document)
            print(f"  {pool}, {method}: {(time.monotonic() - began) / len(cases):.1f} s a map", flush=True)


def main() -> None:
    """Measure unless --show; print the tables of the result file and draw its figure."""
    parser = results.parser(__doc__, "pointing_game.json")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--backbone", type=Path)
    parser.add_argument("--pools", nargs="+", choices=("both", "mean", "cls"), default=["both", "mean", "cls"])
    parser.add_argument("--methods", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if not options.show:
        run(options)
    document = json.loads(options.out.read_text())
    patients, main_rows = [c["patient"] for c in document["cases"]], [c["finding"] == MAIN for c in document["cases"]]
    for pool, result in document["pools"].items():
        for title, chosen in ((MAIN, np.array(main_rows)), ("other findings, pooled", ~np.array(main_rows))):
            table = summary(result["rows"], patients, np.flatnonzero(chosen))
            print(f"\npool {pool}, {title}, {chosen.sum()} cases; AUC of the head {result['auc']}\n{as_text(table)}")
            if (pool, title) == (next(iter(document["pools"])), MAIN):
                heading = f'{MAIN}: {chosen.sum()} images with boxes, pool "{pool}", mean and 95 % interval'
                draw_figure(table, f"{heading}; dotted: centre of the image", options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
