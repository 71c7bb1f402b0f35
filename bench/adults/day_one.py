"""A site without a pretrained backbone: T=0 and three rounds of `init`'s defaults against raw pixels, paired draws.

    python bench/adults/day_one.py --data DIR --work DIR [--sets kermany224 nih_adult512] [--draws 0 1 2]

Children: 74 labels of "abnormal"; adults: 80 labels of six findings. In a draw, 35 % of the patients are for the test, 60
labelled images for choices, and the stream arrives in three parts, LARGEST images in all. Both models get the same labels.
A killed run resumes: each finished cell is a file of scores in the work folder. Images are never committed.
"""

import json
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's learner, whichever is installed

from bench.adults.images import FINDINGS
from bench.adults.table import interval, resampled, weighted_auc
from bench.common import machine, results
from bench.common.public_images import PublicImage, read_plate, read_set
from learner.data.plates import read_plates
from learner.engine.checkpoint import save_weights
from learner.engine.step import State
from learner.evaluation import pixel_baseline
from learner.networks.blend import read_blend
from learner.recipes import evolve
from learner.round.manifest import RoundManifest, Sample
from learner.round.recipe import resolve
from learner.training.blend_fit import blend_logits
from learner.training.head_fit import logits_of
from learner.training.run import Run

SETS = {"kermany224": (74, FINDINGS[:1]), "nih_adult512": (80, FINDINGS)}  # labelled images and findings
DRAWS, TEST_SHARE, VALIDATION, LARGEST, ROUNDS = list(range(8)), 0.35, 60, 600, 3
MOST_TEST = 600  # test images at most: children have thousands
BAR = -0.01  # of the interval's lower end


@dataclass(frozen=True)
class Parts:
    """One draw of a set: images by their use."""

    findings: tuple[str, ...]
    labelled: list[Sample]
    validation: list[Sample]
    rounds: list[list[Sample]]
    test: list[Sample]


class ScoringRun(Run):
    """A round of the product that scores test images in place of exporting ONNX."""

    test: list[Sample]
    scores: dict[str, np.ndarray]

    def export(self, name: str, state: State, serve: str, chosen: str | None = None, plan: object = None) -> None:
        network, blend = state.teacher if serve == "teacher" else state.student, read_blend(state.extra)
        save_weights(self.manifest.folder / f"{name}.safetensors", state, self.plan, self.manifest.findings)
        logits = logits_of(self, network, self.test)
        self.scores[name] = (blend_logits(self, blend, logits, self.test) if blend else logits).numpy()


def main() -> None:
    """Run the missing cells; print and write the table."""
    parser = results.parser(__doc__, "day_one.json")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sets", nargs="*", choices=list(SETS), default=list(SETS))
    parser.add_argument("--draws", type=int, nargs="*", default=DRAWS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = {}
    for name in options.sets:
        images = read_set(options.data / name)
        cells = {}
        for seed in options.draws:
            parts = divide(images, name, seed, options.work / "plates")
            cells[seed] = parts, run_cell(parts, options.work / f"{name}-{seed}", seed)
        table[name] = compare(cells)
        print(name, json.dumps(table[name]), flush=True)
    if options.draws == DRAWS and set(options.sets) == set(SETS):
        results.write(options.out, {"machine": machine.facts("torch", "timm"), "bar": BAR, "sets": table})


def divide(images: list[PublicImage], name: str, seed: int, plates: Path) -> Parts:
    """Return the parts of one draw; the plates of its images are written once."""
    count, findings = SETS[name]
    rng = np.random.default_rng([seed, 41])
    groups: dict[str, list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(image.patient, []).append(i)
    order = rng.permutation(sorted(groups))
    tested = int(TEST_SHARE * len(order))
    test = [i for patient in order[:tested] for i in groups[patient]][:MOST_TEST]
    rest = [i for patient in order[tested:] for i in groups[patient]]
    labelled, validation = rest[:count], rest[count : count + VALIDATION]
    stream = np.array_split(np.array(rest[count + VALIDATION : LARGEST]), ROUNDS)
    plates.mkdir(parents=True, exist_ok=True)

    def sample(i: int, range_: str, known: bool) -> Sample:
        image = images[i]
        plate = plates / f"{name}-{i}.npy"
        if not plate.exists():
            np.save(plate, read_plate(image.picture))
        truth = (image.abnormal, *(image.has(finding) for finding in findings[1:]))
        return Sample(i, image.patient, plate, range_, truth if known else (None,) * len(findings))

    return Parts(
        findings,
        [sample(i, "train", True) for i in labelled],
        [sample(i, "validation", True) for i in validation],
        [[sample(int(i), "train", False) for i in part] for part in stream],
        [sample(i, "test", True) for i in test],
    )


def run_cell(parts: Parts, folder: Path, seed: int) -> dict[str, np.ndarray]:
    """Return scores [N, F] of the test images: of raw pixels, T=0 and each round; computed once."""
    done = folder.with_suffix(".npz")
    if done.exists():
        return dict(np.load(done))
    small = [pixel_baseline.thumbnails(read_plates(part).numpy()) for part in (parts.labelled, parts.test)]
    truth = np.array([sample.labels for sample in parts.labelled], float)
    scores, parent = {"raw pixels": pixel_baseline.fit(small[0], truth).scores(small[1])}, None
    recipe = replace(resolve("evolve", "cpu", {"threads": 1}), seed=seed)
    for number in range(1, ROUNDS + 1):
        here, started = folder / f"r{number}", time.monotonic()
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir(parents=True)
        samples = [*parts.labelled, *(sample for part in parts.rounds[:number] for sample in part), *parts.validation]
        run = ScoringRun(
            RoundManifest(
                here, f"r{number}", parts.findings, recipe, parent and "parent", parent, None, tuple(samples), "day one"
            )
        )
        run.test, run.scores = parts.test, {}
        evolve.train(run)
        run.progress.close()
        if "t0" in run.scores:
            scores["T=0"] = run.scores["t0"]
        scores[f"T={number}"] = run.scores["final"]
        parent = here / "final.safetensors"
        print(f"{folder.name} T={number}: {time.monotonic() - started:.0f} s", flush=True)
    np.savez(done, **scores)  # type: ignore[arg-type]
    shutil.rmtree(folder)
    return scores


def compare(cells: dict[int, tuple[Parts, dict[str, np.ndarray]]]) -> dict:
    """Return macro AUC of each model, and its difference to raw pixels with a two-level 95 % interval."""
    curves = {
        seed: {name: macro(parts, s, seed) for name, s in scores.items()} for seed, (parts, scores) in cells.items()
    }
    names = list(next(iter(curves.values())))
    found: dict = {"draws": len(cells)}
    for name in names:
        differences = np.stack([by[name] - by["raw pixels"] for by in curves.values()])
        mean, ci = interval(differences)
        found[name] = {"auc": round(float(np.mean([by[name][0] for by in curves.values()])), 4)}
        if name != "raw pixels":
            found[name] |= {"minus raw pixels": mean, "ci": ci, "bar met": ci[0] > BAR}
    return found


def macro(parts: Parts, scores: np.ndarray, seed: int) -> np.ndarray:
    """Return float [1 + BOOTSTRAPS]: macro AUC, without and with resampling of the test patients."""
    truth = np.array([sample.labels for sample in parts.test])
    weights = resampled([sample.patient for sample in parts.test], seed)
    return np.nanmean(weighted_auc(scores, truth, weights), 1)


if __name__ == "__main__":
    main()
