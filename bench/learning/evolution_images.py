"""The images of experiments A, B and C: public chest X-rays, split by patient.

Reads `DIR/kermany224`, `DIR/nih1000_64` and `DIR/mednist_cxr64` and writes plates into a work folder. One finding,
abnormal: any finding against "No Finding". Images and plates are never committed.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.common.public_images import read_plate, read_set
from learner.round.manifest import Sample

NEAR = ("kermany224", "nih1000_64")  # the images of experiment A; the first token bank holds them
FAR = ("mednist_cxr64", "kermany64")  # further images of B and C; kermany64 is Kermany's test set at 64 px
VALIDATION = 200  # images, by patient, for choices only; never in training
SEEDS_B = 80  # labelled images of experiment B, and as many for choices; half of the NIH set has about 260


@dataclass(frozen=True)
class Pool:
    """All images of an experiment by source. It holds the labels that the learner may not see."""

    samples: tuple[Sample, ...]
    truth: np.ndarray  # by position: 1, 0, or -1 = unknown
    source: np.ndarray  # "kermany-train", "kermany-test", "nih", "mednist", "kermany64"

    def at(self, source: str) -> np.ndarray:
        """Return the positions of a source's images."""
        return np.flatnonzero(self.source == source)

    def first(self, count: int) -> "Pool":
        """Return the pool of the first `count` images."""
        return Pool(self.samples[:count], self.truth[:count], self.source[:count])


def read_pool(data: Path, work: Path, sets: tuple[str, ...]) -> Pool:
    """Return the images of these sets; their plates are written to `work/plates` once."""
    (work / "plates").mkdir(parents=True, exist_ok=True)
    samples, truth, source = [], [], []
    for name in sets:
        small = name == "kermany64"
        for image in read_set(data / ("kermany224" if small else name)):
            if small and image.split != "test":
                continue
            number = len(samples)
            plate = work / "plates" / f"{name}-{image.picture.stem}.npy"
            if not plate.exists():
                np.save(plate, read_plate(image.picture, 64 if small else None))
            samples.append(Sample(number, image.patient_id or f"{name}-{number}", plate, "train", (None,)))
            truth.append(image.abnormal)
            sources = {"kermany224": f"kermany-{image.split}", "nih1000_64": "nih", "kermany64": "kermany64"}
            source.append(sources.get(name, "mednist"))
    return Pool(tuple(samples), np.array(truth), np.array(source))


@dataclass(frozen=True)
class Draw:
    """One random division of the train images, by patient: positions in the pool."""

    labelled: np.ndarray
    validation: np.ndarray
    rounds: tuple[np.ndarray, ...]  # unlabelled images that arrive before T=1, 2, 3
    ceiling: np.ndarray  # images whose labels the fully labelled arm uses as well
    tests: dict[str, np.ndarray]


def draw(pool: Pool, experiment: str, share: float, seed: int) -> Draw:
    """Return one draw of experiment A, B or C.

    A: `share` of Kermany's train images labelled, the rest in three rounds; tests: Kermany's own, NIH.
    B: SEEDS_B images of one half of NIH's patients labelled, MedNIST in three rounds; tests: NIH's other half, Kermany at
    64 px. C: as A, and MedNIST joins in two halves from T=2 on.
    """
    if experiment == "B":
        halves = nih_halves(pool)
        own_half, test_half = halves[seed % 2], halves[1 - seed % 2]
        parts = divide(pool, own_half, (SEEDS_B, SEEDS_B), seed, 1)
        stream = np.random.default_rng([seed, 21]).permutation(pool.at("mednist"))
        tests = {"internal": test_half, "external": pool.at("kermany64")}
        return Draw(parts[0], parts[1], tuple(np.array_split(stream, 3)), parts[2][0], tests)
    samples = pool.at("kermany-train")
    labelled, validation, rounds = divide(pool, samples, (round(share * len(samples)), VALIDATION), seed, 3)
    ceiling, tests = np.concatenate(rounds), {"internal": pool.at("kermany-test"), "external": pool.at("nih")}
    if experiment == "C":
        first, second = np.array_split(np.random.default_rng([seed, 21]).permutation(pool.at("mednist")), 2)
        rounds = [rounds[0], np.concatenate([rounds[1], first]), np.concatenate([rounds[2], second])]
    return Draw(labelled, validation, tuple(rounds), ceiling, tests)


def nih_halves(pool: Pool) -> list[np.ndarray]:
    """Return the NIH images in two halves by patient, always the same."""
    samples = pool.at("nih")
    order = np.random.default_rng(20).permutation(sorted({pool.samples[i].patient for i in samples}))
    second = set(order[: len(order) // 2])
    inside = np.array([pool.samples[i].patient in second for i in samples])
    return [samples[~inside], samples[inside]]


def divide(
    pool: Pool, positions: np.ndarray, wanted: tuple[int, int], seed: int, rounds: int
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Divide by patient: labelled images (both classes), validation images, the rest in equal rounds."""
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
    """Return these images for the learner, with or without their labels."""
    return [replace(pool.samples[i], range=range_, labels=(int(pool.truth[i]) if labelled else None,)) for i in places]
