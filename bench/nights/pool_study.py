"""What one device that sends nine tenths of the stream does to the others, with the newest images and with the pool.

1. Near-duplicates: which changed copies of an image the limit of `dicom/pixels/near_duplicate.py` finds, and how many images of
   different patients it takes for copies.
2. The stream: nine tenths come from one busy device. A round learns from the newest images ("newest", as before) or from
   the pool of `agent/images/pool.py` ("pool"); "others alone" never sees the busy device. AUC on test patients of the
   other devices, on whom no choice was made. Two learners, each a function of labelled images and pool. Patch features:
   k-means of the pool's patches (Coates, Lee and Ng 2011) under a logistic regression. Self-training: raw pixels, hard
   pseudo-labels for the surest three quarters of the pool.
3. The cost of an image and of a draw, in ledgers of growing size.

    python bench/nights/pool_study.py --data DIR [--draws 8] [--out bench/results/pool_study.json]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, rotate, shift

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from agent.images import pool
from agent.ledger.database import utc
from agent.site import site as sites
from agent.site.config import checked
from bench.common import machine, results
from bench.common.public_images import PublicImage, read_plate, read_set
from bench.nights.pool_learners import LEARNERS
from dicom.pixels import near_duplicate
from learner.evaluation.auc import auc

SIDE = 96  # pixels of the images that both learners see
SIZE = 300  # images in a round
LABELLED, TEST_SHARE = 80, 0.35
BUSY_SHARE = 0.9
RESAMPLES = 1000
KEY = bytes(range(32))
ARMS = ("newest", "pool", "others alone")

Learner = Callable[[np.ndarray, np.ndarray, np.ndarray, int], Callable[[np.ndarray], np.ndarray]]


@dataclass(frozen=True)
class Hospital:
    """Images of the busy device and of the others; the labels of the others."""

    busy: np.ndarray  # uint8 [N, SIDE, SIDE]
    others: np.ndarray
    abnormal: np.ndarray  # of the others
    patients: np.ndarray


def small(image: PublicImage) -> np.ndarray:
    """Return a picture, letterboxed as a plate, at SIDE pixels."""
    plate = Image.fromarray(read_plate(image.picture, SIDE))
    return np.asarray(plate.resize((SIDE, SIDE), Image.Resampling.BOX))


def hospitals(data: Path) -> dict[str, Hospital]:
    """Return three hospitals by their busy device: a children's unit, the same with inverted images, a bedside device.

    The others are adults; beside the bedside device (AP) a wall stand (PA).
    """
    adults = read_set(data / "nih_adult512")
    children = [image for image in read_set(data / "kermany224") if image.split == "train"]
    children = [children[i] for i in np.random.default_rng(3).permutation(len(children))[:3000]]
    pixels = {image.picture: small(image) for image in [*adults, *children]}

    def hospital(busy: list[PublicImage], others: list[PublicImage]) -> Hospital:
        stack, rest = (np.stack([pixels[image.picture] for image in images]) for images in (busy, others))
        return Hospital(
            stack, rest, np.array([image.abnormal for image in others]), np.array([image.patient for image in others])
        )

    bedside, wall = ([image for image in adults if image.view == view] for view in ("AP", "PA"))
    unit = hospital(children, adults)
    return {
        "children's unit": unit,
        "children's unit, inverted": replace(unit, busy=255 - unit.busy),
        "bedside device": hospital(bedside, wall),
    }


# Near-duplicates


def changed(plate: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return changed copies of a plate, by the change."""
    level = plate.astype(float)
    copies = {
        "noise of 10 grey levels": level + rng.normal(0, 10, level.shape),
        "gamma 0.7": 255 * (level / 255) ** 0.7,
        "blur of 2 px": gaussian_filter(level, 2),
        "shifted by 4 px": shift(level, (4, 4), order=1, mode="nearest"),
        "shifted by 10 px": shift(level, (10, 10), order=1, mode="nearest"),
        "rotated by 2 degrees": rotate(level, 2, reshape=False, order=1, mode="nearest"),
        "rotated by 5 degrees": rotate(level, 5, reshape=False, order=1, mode="nearest"),
        "mirrored": level[:, ::-1],
    }
    return {name: np.clip(copy, 0, 255).astype(np.uint8) for name, copy in copies.items()}


def near_duplicates(data: Path) -> dict[str, Any]:
    """Return the share of changed copies that share a band and are within LIMIT, and of pairs of different patients."""
    rng, found = np.random.default_rng(5), dict[str, list[bool]]()
    answer: dict[str, Any] = {}
    for name in ("nih_adult512", "kermany224"):
        images = [one for one in read_set(data / name) if one.split != "test"]
        images = [images[i] for i in rng.permutation(len(images))[:900]]
        plates = [read_plate(image.picture) for image in images]
        codes = [near_duplicate.code(plate, KEY) for plate in plates]
        for plate, code in zip(plates[:100], codes, strict=False):
            for change, copy in changed(plate, rng).items():
                found.setdefault(change, []).append(is_found(code, near_duplicate.code(copy, KEY)))
        taken = [
            any(is_found(codes[j], codes[i]) for j in range(i) if images[i].patient != images[j].patient)
            for i in range(len(images))
        ]
        answer[f"{name}: images taken for a copy of another patient's"] = f"{sum(taken)} of {len(taken)}"
    return {"copies found": {change: float(np.mean(hits)) for change, hits in found.items()}, **answer}


def is_found(stored: bytes, code: bytes) -> bool:
    """Return True when the pool finds `code` to be a copy of `stored`."""
    shared = set(near_duplicate.bands(stored)) & set(near_duplicate.bands(code))
    return bool(shared) and near_duplicate.distance(stored, code) <= near_duplicate.LIMIT


# The stream


def one_draw(hospital: Hospital, seed: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], dict[str, int]]:
    """Return labelled and test images of the others (positions), the pool of each arm (pixels), and its busy images."""
    rng = np.random.default_rng([seed, 11])
    people = np.random.default_rng(9).permutation(np.unique(hospital.patients))  # the same test patients in every draw
    test = np.isin(hospital.patients, people[: round(TEST_SHARE * len(people))])
    rest = rng.permutation(np.flatnonzero(~test))
    labelled, stream = rest[:LABELLED], rest[LABELLED:]
    count = round(min(len(hospital.busy), len(stream) * BUSY_SHARE / (1 - BUSY_SHARE)))
    stream = stream[: round(count * (1 - BUSY_SHARE) / BUSY_SHARE)]
    busy = rng.permutation(len(hospital.busy))[:count]
    pixels = np.concatenate([hospital.others[stream], hospital.busy[busy]])
    arrival = rng.permutation(len(pixels))  # the newest last
    draws = rng.random(len(pixels))
    size = min(SIZE, len(pixels) // 2)
    entries = [
        pool.Entry(int(i), f"p{i}", "others" if i < len(stream) else "busy", float(draws[i]))
        for i in np.argsort(-draws)
    ]
    chosen = {
        "newest": arrival[-size:],
        "pool": np.array(sorted(pool.choose(entries, size, 4, 0.5, {}))),
        "others alone": np.arange(len(stream)),
    }
    images = {arm: pixels[places] for arm, places in chosen.items()}
    busy_images = {arm: int((places >= len(stream)).sum()) for arm, places in chosen.items()}
    return labelled, np.flatnonzero(test), images, busy_images


def study(hospital: Hospital, learn: Learner, draws: int) -> dict[str, Any]:
    """Return mean AUC of each arm on the others' test patients, and pool minus newest with a two-level interval."""
    scores: dict[str, list[np.ndarray]] = {arm: [] for arm in ARMS}
    test, counts, busy = np.array([]), {}, {}
    for seed in range(draws):
        labelled, test, images, busy = one_draw(hospital, seed)
        counts = {arm: len(pixels) for arm, pixels in images.items()}
        for arm, pixels in images.items():
            predict = learn(hospital.others[labelled], hospital.abnormal[labelled], pixels, seed)
            scores[arm].append(predict(hospital.others[test]))
    truth, patients = hospital.abnormal[test], hospital.patients[test]
    areas = {arm: [float(auc(one, truth) or 0) for one in lists] for arm, lists in scores.items()}
    return {
        "images": counts, "of the busy device": busy, "test patients": len(np.unique(patients)),
        "auc": {arm: round(float(np.mean(values)), 4) for arm, values in areas.items()},
        "auc_sd": {arm: round(float(np.std(values, ddof=1)), 4) for arm, values in areas.items()},
        "pool - newest": interval(scores["pool"], scores["newest"], truth, patients),
        "others alone - newest": interval(scores["others alone"], scores["newest"], truth, patients),
    }  # fmt: skip


def interval(first: list[np.ndarray], second: list[np.ndarray], truth: np.ndarray, patients: np.ndarray) -> list[float]:
    """Return the mean paired difference of AUC and its 95 % interval, resampling draws and patients."""
    rng, people = np.random.default_rng(2), np.unique(patients)
    rows = [np.flatnonzero(patients == one) for one in people]

    def difference(draws: np.ndarray, places: np.ndarray) -> float:
        pairs = [(auc(first[d][places], truth[places]), auc(second[d][places], truth[places])) for d in draws]
        return float(np.mean([(a or 0) - (b or 0) for a, b in pairs]))

    whole = difference(np.arange(len(first)), np.arange(len(truth)))
    resampled = [
        difference(
            rng.integers(0, len(first), len(first)),
            np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))]),
        )
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return [round(float(value), 4) for value in (whole, low, high)]


# The cost


def costs(sizes: tuple[int, ...] = (1_000, 10_000, 50_000)) -> list[dict[str, float]]:
    """Return the time of an image and of a draw in a ledger with so many images, with random codes."""
    rng, answer = np.random.default_rng(4), []
    with tempfile.TemporaryDirectory() as folder:
        site = sites.init(Path(folder) / "site", checked({"learn": {"max_unlabelled": 1000}}))
        plate = site.store.keep_plate(rng.integers(0, 255, (512, 512), np.uint8), "0" * 64)
        with site.ledger() as ledger:
            for size in sizes:
                with ledger.transaction():
                    for number in range(ledger.value("SELECT count(*) FROM image"), size):
                        insert(ledger, number, plate)
                        row = {"id": number + 1, "sha256": str(number)}
                        pool._add(ledger, row, rng.bytes(near_duplicate.BITS // 8), KEY)
                with ledger.transaction():
                    for number in range(size, size + pool.BATCH):
                        insert(ledger, number, plate)
                began = time.perf_counter()
                pool.step(site, ledger)
                upkeep = (time.perf_counter() - began) / pool.BATCH
                began = time.perf_counter()
                pool.draw(site, ledger, datetime.now(UTC), {})
                drawing = time.perf_counter() - began
                answer.append({"images": size, "ms_an_image": round(1e3 * upkeep, 2), "s_a_draw": round(drawing, 2)})
    return answer


def insert(ledger: Any, number: int, plate: str) -> None:
    """Write the row of an image of the train range."""
    ledger.insert(
        "image", sha256=str(number), state="stored", range="train", plate=plate, original="", patient_key=f"p{number}",
        received_at=utc(), stored_at=utc(), scanner=f"scanner {number % 5}",
    )  # fmt: skip


def main() -> None:
    arguments = results.parser(__doc__, "pool_study.json")
    arguments.add_argument("--data", type=Path, required=True, help="folder with nih_adult512 and kermany224")
    arguments.add_argument("--draws", type=int, default=8)
    chosen = arguments.parse_args()
    document: dict[str, Any] = {"machine": machine.facts("numpy"), "draws": chosen.draws}
    document["near-duplicates"] = near_duplicates(chosen.data)
    print(document["near-duplicates"], flush=True)
    document["cost"] = costs()
    print(document["cost"], flush=True)
    document["stream"] = {}
    for name, hospital in hospitals(chosen.data).items():
        for method, learn in LEARNERS.items():
            document["stream"][f"{name}, {method}"] = study(hospital, learn, chosen.draws)
            print(name, method, document["stream"][f"{name}, {method}"], flush=True)
    results.write(chosen.out, document)


if __name__ == "__main__":
    main()
