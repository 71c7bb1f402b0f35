"""The films of experiments A, B and C: public chest X-rays read from their folders, split by patient.

Reads `DIR/kermany224`, `DIR/nih1000_64` and `DIR/mednist_cxr64` (each a manifest.csv and its images) and writes plates
into a work folder. One finding, abnormal: any finding against "No Finding". Nothing of them is ever committed.
"""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from learner.round_dir import PLATE_SHAPE, Film

SETS = ("kermany224", "nih1000_64", "mednist_cxr64")
VALIDATION = 200  # films by patient that choices are made on, never trained on


@dataclass(frozen=True)
class Pool:
    """All films of an experiment, by where they come from; labels are known here and hidden from the learner."""

    films: tuple[Film, ...]
    truth: np.ndarray  # by position: 1, 0, or -1 = unknown
    source: np.ndarray  # "kermany-train", "kermany-test", "nih", "mednist"

    def at(self, source: str) -> np.ndarray:
        return np.flatnonzero(self.source == source)


def read_pool(data: Path, work: Path, sets: tuple[str, ...]) -> Pool:
    """Plates of these sets in `work/plates` (made once) and what is known of them."""
    (work / "plates").mkdir(parents=True, exist_ok=True)
    films, truth, source = [], [], []
    for name in sets:
        with (data / name / "manifest.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                number = len(films)
                plate = work / "plates" / f"{name}-{Path(row['file']).stem}.npy"
                if not plate.exists():
                    np.save(plate, to_plate(data / name / row["file"]))
                patient = row["patient_id"] or f"{name}-{number}"
                films.append(Film(number, patient, plate, "train", (None,)))
                truth.append(-1 if not row["labels"] else int(row["labels"] != "No Finding"))
                source.append({"kermany224": f"kermany-{row['split']}", "nih1000_64": "nih"}.get(name, "mednist"))
    return Pool(tuple(films), np.array(truth), np.array(source))


def to_plate(path: Path) -> np.ndarray:
    """uint8 [512, 512]: the picture, letterboxed and enlarged without new detail."""
    grey = Image.open(path).convert("L")
    scale = min(PLATE_SHAPE[0] / grey.height, PLATE_SHAPE[1] / grey.width)
    sized = grey.resize((round(grey.width * scale), round(grey.height * scale)), Image.Resampling.BILINEAR)
    plate = Image.new("L", PLATE_SHAPE[::-1])
    plate.paste(sized, ((plate.width - sized.width) // 2, (plate.height - sized.height) // 2))
    return np.asarray(plate, np.uint8)


@dataclass(frozen=True)
class Draw:
    """One random division of the train films, by patient: positions in the pool."""

    labelled: np.ndarray
    validation: np.ndarray
    rounds: tuple[np.ndarray, ...]  # what arrives unlabelled before T=1, 2, 3


def draw(pool: Pool, positions: np.ndarray, share: float, seed: int, rounds: int = 3) -> Draw:
    """`share` of the films with labels (at least one film of each class), VALIDATION films, the rest in equal rounds."""
    rng = np.random.default_rng([seed, 20])
    patients: dict[str, list[int]] = {}
    for place in positions:
        patients.setdefault(pool.films[place].patient, []).append(int(place))
    groups = [patients[p] for p in rng.permutation(sorted(patients))]
    wanted = [round(share * len(positions)), VALIDATION]
    parts: list[list[int]] = [[], []]
    left = []
    for group in groups:
        part = next((p for p, size in zip(parts, wanted, strict=True) if len(p) < size), left)
        part.extend(group) if part is not left else left.append(group)
    labelled = np.array(parts[0])
    if len(set(pool.truth[labelled])) < 2:
        return draw(pool, positions, share, seed + 1000, rounds)
    arriving = [np.array([place for group in left[i::rounds] for place in group]) for i in range(rounds)]
    return Draw(labelled, np.array(parts[1]), tuple(arriving))


def as_films(pool: Pool, places: np.ndarray, range_: str, labelled: bool) -> list[Film]:
    """Films as the learner may see them."""
    return [replace(pool.films[i], range=range_, labels=(int(pool.truth[i]) if labelled else None,)) for i in places]
