"""The images of experiment D: adults with several findings, split by patient. Images and plates are never committed."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.common.public_images import read_plate, read_set
from learner.round.manifest import Sample

ABNORMAL = "abnormal"  # any finding against "No Finding"
FINDINGS = (ABNORMAL, "Effusion", "Edema", "Pneumonia", "Cardiomegaly", "Pneumothorax")
TEST_SHARE = 0.35  # of the patients, always the same ones
VALIDATION = 60  # labelled images, by patient, for choices only; never in training


@dataclass(frozen=True)
class Adults:
    """All images, adults first and then MedNIST's, with the labels that the learner may not see."""

    samples: tuple[Sample, ...]
    truth: np.ndarray  # (N, F): 1, 0, or -1 = unknown
    view: np.ndarray  # "PA", "AP" or ""

    @property
    def labelled_count(self) -> int:
        """Number of adults with labels; the images of MedNIST follow."""
        return int((self.truth[:, 0] >= 0).sum())


def read_adults(data: Path, work: Path, mednist: bool) -> Adults:
    """Return the adults, with MedNIST's images if asked; their plates are written to `work/plates` once."""
    (work / "plates").mkdir(parents=True, exist_ok=True)
    samples, truth, view = [], [], []
    for name in ("nih_adult512", *(["mednist_cxr64"] if mednist else [])):
        for image in read_set(data / name):
            number = len(samples)
            plate = work / "plates" / f"{name}-{image.picture.stem}.npy"
            if not plate.exists():
                np.save(plate, read_plate(image.picture))
            unknown = (None,) * len(FINDINGS)
            samples.append(Sample(number, image.patient_id or f"{name}-{number}", plate, "train", unknown))
            known = [image.abnormal, *(image.has(finding) for finding in FINDINGS[1:])]
            truth.append(known if image.labels else [-1] * len(FINDINGS))
            view.append(image.view)
    return Adults(tuple(samples), np.array(truth), np.array(view))


@dataclass(frozen=True)
class Division:
    """One random division of the patients outside the test: positions of images."""

    labelled: np.ndarray
    validation: np.ndarray
    rounds: tuple[np.ndarray, ...]  # unlabelled images that arrive before T=1, 2, 3
    test: np.ndarray


def divide(adults: Adults, labels: int, seed: int, mednist: bool = False) -> Division:
    """Return the division of one draw: `labels` labelled images, VALIDATION for choices, the rest in three rounds.

    With mednist its images join the rounds, a third each.
    """
    own = adults.labelled_count
    groups: dict[str, list[int]] = {}
    for i in range(own):
        groups.setdefault(adults.samples[i].patient, []).append(i)
    fixed = np.random.default_rng(2026).permutation(sorted(groups))
    tested = int(TEST_SHARE * len(fixed))
    test = [i for patient in fixed[:tested] for i in groups[patient]]
    order = np.random.default_rng([seed, 30]).permutation(fixed[tested:])
    parts: list[list[int]] = [[], []]
    rest: list[list[int]] = [[], [], []]
    for number, patient in enumerate(order):
        wanted = zip(parts, (labels, VALIDATION), strict=True)
        part = next((p for p, size in wanted if len(p) < size), rest[number % 3])
        part.extend(groups[patient])
    if mednist:
        far = np.random.default_rng([seed, 31]).permutation(np.arange(own, len(adults.samples)))
        for part, more in zip(rest, np.array_split(far, 3), strict=True):
            part.extend(more.tolist())
    arrays = [np.array(part) for part in rest]
    return Division(np.array(parts[0][:labels]), np.array(parts[1]), tuple(arrays), np.array(test))


def as_samples(adults: Adults, places: np.ndarray, range_: str, labelled: bool) -> list[Sample]:
    """Return these images for the learner, with or without their labels."""
    return [
        replace(
            adults.samples[i],
            range=range_,
            labels=tuple(map(int, adults.truth[i])) if labelled else (None,) * len(FINDINGS),
        )
        for i in places
    ]
