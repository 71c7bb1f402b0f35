"""The images of experiments A, B and C: public chest X-rays read from their folders, split by patient.

Reads `DIR/kermany224`, `DIR/nih1000_64` and `DIR/mednist_cxr64` (each a manifest.csv and its images) and writes plates
into a work folder. One finding, abnormal: any finding against "No Finding". Nothing of them is ever committed.
"""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from cxrloop.plate import PLATE_SHAPE
from learner.round.manifest import Sample

NEAR = ("kermany224", "nih1000_64")  # the images of experiment A; their tokens make the first bank
FAR = ("mednist_cxr64", "kermany64")  # what B and C need beside them; kermany64 is Kermany's test shrunk to 64 px
VALIDATION = 200  # images by patient that choices are made on, never trained on
SEEDS_B = 80  # labelled images of experiment B, and as many for its choices: half of NIH's 1000 has some 260


@dataclass(frozen=True)
class Pool:
    """All images of an experiment, by where they come from; labels are known here and hidden from the learner."""

    samples: tuple[Sample, ...]
    truth: np.ndarray  # by position: 1, 0, or -1 = unknown
    source: np.ndarray  # "kermany-train", "kermany-test", "nih", "mednist", "kermany64"

    def at(self, source: str) -> np.ndarray:
        return np.flatnonzero(self.source == source)

    def first(self, count: int) -> "Pool":
        return Pool(self.samples[:count], self.truth[:count], self.source[:count])


def read_pool(data: Path, work: Path, sets: tuple[str, ...]) -> Pool:
    """Plates of these sets in `work/plates` (made once) and what is known of them."""
    (work / "plates").mkdir(parents=True, exist_ok=True)
    samples, truth, source = [], [], []
    for name in sets:
        small = name == "kermany64"
        folder = data / ("kermany224" if small else name)
        with (folder / "manifest.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                if small and row["split"] != "test":
                    continue
                number = len(samples)
                plate = work / "plates" / f"{name}-{Path(row['file']).stem}.npy"
                if not plate.exists():
                    np.save(plate, to_plate(folder / row["file"], 64 if small else None))
                patient = row["patient_id"] or f"{name}-{number}"
                samples.append(Sample(number, patient, plate, "train", (None,)))
                truth.append(-1 if not row["labels"] else int(row["labels"] != "No Finding"))
                known = {"kermany224": f"kermany-{row['split']}", "nih1000_64": "nih", "kermany64": "kermany64"}
                source.append(known.get(name, "mednist"))
    return Pool(tuple(samples), np.array(truth), np.array(source))


def to_plate(path: Path, side: int | None = None) -> np.ndarray:
    """uint8 [512, 512]: the picture (first shrunk to `side`), letterboxed and enlarged without new detail."""
    grey = Image.open(path).convert("L")
    if side:
        grey.thumbnail((side, side), Image.Resampling.BOX)
    scale = min(PLATE_SHAPE[0] / grey.height, PLATE_SHAPE[1] / grey.width)
    sized = grey.resize((round(grey.width * scale), round(grey.height * scale)), Image.Resampling.BILINEAR)
    plate = Image.new("L", PLATE_SHAPE[::-1])
    plate.paste(sized, ((plate.width - sized.width) // 2, (plate.height - sized.height) // 2))
    return np.asarray(plate, np.uint8)


@dataclass(frozen=True)
class Draw:
    """One random division of the train images, by patient: positions in the pool."""

    labelled: np.ndarray
    validation: np.ndarray
    rounds: tuple[np.ndarray, ...]  # what arrives unlabelled before T=1, 2, 3
    ceiling: np.ndarray  # beside the labelled ones: what the fully labelled arm may know too
    tests: dict[str, np.ndarray]


def draw(pool: Pool, experiment: str, share: float, seed: int) -> Draw:
    """One draw of experiment A, B or C.

    A: `share` of Kermany's train images labelled, the rest in three rounds; tests: Kermany's own, NIH.
    B: SEEDS_B images of one half of NIH's patients labelled, MedNIST in three rounds; tests: NIH's other half, Kermany at
    64 px. C: as A, and MedNIST joins in two halves from T=2 on.
    """
    if experiment == "B":
        halves = nih_halves(pool)
        mine, other = halves[seed % 2], halves[1 - seed % 2]
        found = divide(pool, mine, (SEEDS_B, SEEDS_B), seed, 1)
        stream = np.random.default_rng([seed, 21]).permutation(pool.at("mednist"))
        tests = {"internal": other, "external": pool.at("kermany64")}
        return Draw(found[0], found[1], tuple(np.array_split(stream, 3)), found[2][0], tests)
    samples = pool.at("kermany-train")
    labelled, validation, rounds = divide(pool, samples, (round(share * len(samples)), VALIDATION), seed, 3)
    ceiling, tests = np.concatenate(rounds), {"internal": pool.at("kermany-test"), "external": pool.at("nih")}
    if experiment == "C":
        first, second = np.array_split(np.random.default_rng([seed, 21]).permutation(pool.at("mednist")), 2)
        rounds = [rounds[0], np.concatenate([rounds[1], first]), np.concatenate([rounds[2], second])]
    return Draw(labelled, validation, tuple(rounds), ceiling, tests)


def nih_halves(pool: Pool) -> list[np.ndarray]:
    """NIH's images in two halves by patient, always the same."""
    samples = pool.at("nih")
    order = np.random.default_rng(20).permutation(sorted({pool.samples[i].patient for i in samples}))
    second = set(order[: len(order) // 2])
    inside = np.array([pool.samples[i].patient in second for i in samples])
    return [samples[~inside], samples[inside]]


def divide(
    pool: Pool, positions: np.ndarray, wanted: tuple[int, int], seed: int, rounds: int
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """By patient: labelled images (at least one of each class), validation images, the rest in equal rounds."""
    rng = np.random.default_rng([seed, 20])
    patients: dict[str, list[int]] = {}
    for place in positions:
        patients.setdefault(pool.samples[place].patient, []).append(int(place))
    groups = [patients[p] for p in rng.permutation(sorted(patients))]
    parts: list[list[int]] = [[], []]
    left = []
    for group in groups:
        part = next((p for p, size in zip(parts, wanted, strict=True) if len(p) < size), left)
        part.extend(group) if part is not left else left.append(group)
    labelled = np.array(parts[0])
    if len(set(pool.truth[labelled])) < 2:
        return divide(pool, positions, wanted, seed + 1000, rounds)
    arriving = [np.array([place for group in left[i::rounds] for place in group]) for i in range(rounds)]
    return labelled, np.array(parts[1]), arriving


def as_samples(pool: Pool, places: np.ndarray, range_: str, labelled: bool) -> list[Sample]:
    """Images as the learner may see them."""
    return [replace(pool.samples[i], range=range_, labels=(int(pool.truth[i]) if labelled else None,)) for i in places]
