"""Train the quality filter and test it on other patients.

    python tools/quality_filter/train.py --data DIR [--dicom DIR]

Writes dicom/pixels/quality.npz and bench/results/quality.json: accepted chest images and rejected other images by origin
and kind, with 95 % intervals (Wilson, n = patients where a set names them). Then the same after training without one
kind of other images, or without one set of chests.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.common import results
from dicom.pixels import quality_filter
from tools.quality_filter import net
from tools.quality_filter.images import CHESTS, KINDS, Images, read_images
from tools.quality_filter.real import drawings, real_images, times

FALSE_REJECTIONS = 0.0015  # share of validation chests, for each of the three questions: at most .45 % in all
UNSEEN = 1500  # images of a set that was left out: enough for an interval of half a percent
LEAST_LIMIT = 0.9  # images of unseen hospitals score lower; this costs nothing on validation images
TURNS = ("rotated 90", "rotated 180", "rotated 270")
WORDS = {"not a chest": "not a chest", "inverted": "inverted", **{turn: turn.replace("d ", "d by ") for turn in TURNS}}


def training_images(
    images: Images, drawn: dict[str, torch.Tensor], chests: Iterable[str], kinds: Iterable[str]
) -> net.TrainingImages:
    """Return the training images of these origins, with the drawings."""
    train = images.where(images.part == "train")
    taken = {name: torch.from_numpy(train.small[train.origin == name]) for name in (*chests, *kinds)}
    return net.TrainingImages({name: taken[name] for name in chests}, {name: taken[name] for name in kinds} | drawn)


def fit(
    images: Images, drawn: dict[str, torch.Tensor], chests: Iterable[str], kinds: Iterable[str], steps: int, seed: int
):
    """Train on the training part of these origins; return the arrays with limits chosen on their validation part."""
    trained = net.train(training_images(images, drawn, chests, kinds), steps, seed).eval()
    return with_limits(net.export(trained, (1, 1, 1)), images, chests)


def with_limits(arrays: dict[str, np.ndarray], images: Images, chests: Iterable[str]) -> dict[str, np.ndarray]:
    """Return the same net with limits chosen on the validation part of these sets."""
    validation = images.where((images.part == "validation") & np.isin(images.origin, tuple(chests)))
    scores = np.array([(1 - a.chest, a.inverted, 1 - a.turned[0]) for a in answers(arrays, validation.small)])
    limits = np.maximum(np.quantile(scores, 1 - FALSE_REJECTIONS, axis=0, method="higher"), LEAST_LIMIT).round(3)
    return arrays | {"limits": limits.astype(np.float64)}


def answers(arrays: dict[str, np.ndarray], small: np.ndarray) -> list[quality_filter.Prediction]:
    """Return the net's answer for each small plate."""
    weights = {name: value.astype(np.float32) for name, value in arrays.items()}
    return [quality_filter.predict(image, weights) for image in small]


def interval(hits: int, n: int, units: int) -> list[float]:
    """Return Wilson's 95 % interval of hits / n with `units` independent units (patients)."""
    if not n:
        return [0.0, 1.0]
    share, z = hits / n, 1.96
    centre, spread = share + z * z / (2 * units), z * np.sqrt(share * (1 - share) / units + (z / (2 * units)) ** 2)
    return [round(float(max(0, (centre + sign * spread) / (1 + z * z / units))), 4) for sign in (-1, 1)]


def row(reasons: list[str | None], images: Images, word: str | None) -> dict:
    """Return the counts of one group; `word`: the expected reason (None: the images should pass)."""
    n, patients = len(reasons), len(set(images.patient.tolist()))
    right = sum(reason is None for reason in reasons) if word is None else sum(reason is not None for reason in reasons)
    named = right if word is None else sum(reason is not None and word in reason for reason in reasons)
    counts = {"images": n, "patients": patients, "right": right, "share": round(right / n, 4) if n else None}
    return counts | {"interval": interval(right, n, patients), "named_right": named}


def judge(arrays: dict[str, np.ndarray], images: Images) -> dict[str, dict]:
    """Return by origin: upright chests that pass, inverted and turned chests and other kinds that are rejected."""
    limits, table = np.asarray(arrays["limits"], float), {}
    for origin in dict.fromkeys(images.origin.tolist()):
        own = images.where(images.origin == origin)
        changes = {"as it is": own.small}
        if own.chest.all():
            changes |= {"inverted": 255 - own.small}
            changes |= {TURNS[k - 1]: np.rot90(own.small, k, (1, 2)) for k in (1, 2, 3)}
        for change, small in changes.items():
            reasons = [quality_filter.verdict(answer, limits) for answer in answers(arrays, small)]
            word = WORDS[change] if change in WORDS else None if own.chest.all() else WORDS["not a chest"]
            table[f"{origin}, {change}"] = row(reasons, own, word)
    return table


def update_result(path: Path, part: dict) -> None:
    """Write a part of the result; the other parts in the file stay."""
    before = json.loads(path.read_text()) if path.exists() else {}
    results.write(path, before | part)


def measure_left_out(images: Images, drawn: dict[str, torch.Tensor], options: argparse.Namespace) -> None:
    """Test nets on origins left out of their training: adults, children, and each kind of other images."""
    steps, seed = options.side_steps, options.seed
    tables = {}
    clouds = {"clouds": drawn["clouds"]}
    trials = {
        "Kermany": (CHESTS[1:], KINDS, drawn),
        "NIH and MedNIST": (CHESTS[:1], KINDS, drawn),
        "hands, and no limb or pelvis drawn": (CHESTS, [kind for kind in KINDS if kind != "Hand"], clouds),
        **{kind: (CHESTS, [k for k in KINDS if k != kind], drawn) for kind in reversed(KINDS)},
    }
    for name, (chests, kinds, drawings_) in trials.items():
        arrays = fit(images, drawings_, chests, kinds, steps, seed)
        unseen = images.where(~np.isin(images.origin, (*chests, *kinds)))
        known = images.where(np.isin(images.origin, kinds if chests != CHESTS else ()) & (images.part == "test"))
        tables[f"trained without {name}"] = judge(arrays, sample(unseen, seed)) | judge(arrays, known)
        show(f"trained without {name}", tables[f"trained without {name}"])
        update_result(options.out, {"side_steps": steps, "left_out": tables})


def sample(images: Images, seed: int) -> Images:
    """Return at most UNSEEN images of each origin."""
    order = np.random.default_rng(seed).permutation(len(images.origin))
    kept = [index for name in np.unique(images.origin) for index in order[images.origin[order] == name][:UNSEEN]]
    return images.where(np.isin(np.arange(len(order)), kept))


def show(title: str, table: dict[str, dict]) -> None:
    """Print a table."""
    print(f"\n{title}\n{'':36}{'images':>7}{'patients':>9}{'right':>8}{'95 %':>17}{'named right':>13}")
    for name, cell in table.items():
        low, high = cell["interval"]
        line = f"{name:36}{cell['images']:7}{cell['patients']:9}{cell['share']:8.2%}{low:9.2%} -{high:7.2%}"
        print(f"{line}{cell['named_right']:13}", flush=True)


def measure(images: Images, options: argparse.Namespace) -> dict:
    """Choose new limits, write the weights, and return the result on test images, drawings and real DICOM files."""
    with np.load(options.weights) as file:
        arrays = with_limits({name: file[name] for name in file.files}, images, CHESTS)
    np.savez(options.weights, **arrays)
    test = images.where(images.part == "test")
    result = {"steps": options.steps, "seed": options.seed, "torch": torch.__version__}
    result |= {"limits": arrays["limits"].tolist(), "bytes": options.weights.stat().st_size}
    print("limits (not a chest, inverted, rotated)", result["limits"], "bytes", result["bytes"])
    result["held_out"] = judge(arrays, test)
    show("held out patients and images", result["held_out"])
    result["saturated"] = {}
    for name in CHESTS:
        shares = images.clipped[images.origin == name]
        refused = int((shares > quality_filter.CLIPPED).sum())
        result["saturated"][name] = {"images": len(shares), "refused": refused, "most": round(float(shares.max()), 3)}
    print("\nsaturated: images, rejected by the rule, largest share clipped", json.dumps(result["saturated"]))
    result["drawings"] = drawings(options.seed)
    print("\ndrawings: share rejected", json.dumps(result["drawings"]))
    result["milliseconds"] = times(test.small)
    print("\nms a plate", result["milliseconds"])
    return result | ({"real": real_images(options.dicom)} if options.dicom else {})


def main() -> None:
    """Train, measure, and test with origins left out, as --only says."""
    parser = results.parser(__doc__, "quality.json")
    parser.add_argument("--data", type=Path, required=True, help="folder with the four sets")
    parser.add_argument("--dicom", type=Path, help="folder of real DICOM files with a manifest.csv")
    parser.add_argument("--weights", type=Path, default=quality_filter.WEIGHTS, help="default: the shipped file")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "quality-images.npz",
        help="keeps the decoded small images",
    )
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--side-steps", type=int, default=300, help="steps of each net with an origin left out")
    parser.add_argument("--only", choices=("measure", "left-out"), help="measure: test the shipped net")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # with the seed, makes two runs equal
    images, drawn = read_images(options.data, options.cache), net.drawn(options.seed)
    if not options.only:
        np.savez(options.weights, **fit(images, drawn, CHESTS, KINDS, options.steps, options.seed))
    if options.only != "left-out":
        update_result(options.out, measure(images, options))
    if options.only != "measure":
        measure_left_out(images, drawn, options)


if __name__ == "__main__":
    main()
