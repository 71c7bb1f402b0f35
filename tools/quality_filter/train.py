"""Train the in-line quality filter, and say what it does on patients it never saw.

`python tools/quality_filter/train.py --data DIR [--dicom DIR]` writes dicom/pixels/quality.npz and bench/results/quality.json: passes
of chest images and refusals of everything else by origin and kind, with 95 % intervals (Wilson, n = patients where a set
names them); then the same with one kind of non-chest, or one set of chests, left out of training.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dicom.pixels import quality_filter
from tools.quality_filter import net
from tools.quality_filter.images import CHESTS, KINDS, Images, read_images
from tools.quality_filter.real import drawings, real_images, times

RESULT = Path(__file__).resolve().parents[2] / "bench" / "results" / "quality.json"
FALSE_REFUSALS = 0.0015  # of all validation images, for each of the three questions: at most .45 % in all
UNSEEN = 1500  # images of a set that was left out: enough for an interval of half a per cent
FLOOR = 0.9  # no limit below this: images of a hospital that the net never saw come out less sure, and validation loses nothing
TURNS = ("rotated 90", "rotated 180", "rotated 270")
WORDS = {"not a chest": "not a chest", "inverted": "inverted", **{turn: turn.replace("d ", "d by ") for turn in TURNS}}


def shelf(images: Images, drawn: dict[str, torch.Tensor], chests: Iterable[str], kinds: Iterable[str]) -> net.Shelf:
    train = images.where(images.part == "train")
    taken = {name: torch.from_numpy(train.small[train.origin == name]) for name in (*chests, *kinds)}
    return net.Shelf({name: taken[name] for name in chests}, {name: taken[name] for name in kinds} | drawn)


def fit(
    images: Images, drawn: dict[str, torch.Tensor], chests: Iterable[str], kinds: Iterable[str], steps: int, seed: int
):
    """The arrays of a net trained on the training part of these origins, limits chosen on their validation part."""
    trained = net.train(shelf(images, drawn, chests, kinds), steps, seed).eval()
    return limited(net.export(trained, (1, 1, 1)), images, chests)


def limited(arrays: dict[str, np.ndarray], images: Images, chests: Iterable[str]) -> dict[str, np.ndarray]:
    """The same net with limits chosen on the validation part of these sets."""
    mine = images.where((images.part == "validation") & np.isin(images.origin, tuple(chests)))
    said = np.array([(1 - a.chest, a.inverted, 1 - a.turned[0]) for a in answers(arrays, mine.small)])
    limits = np.maximum(np.quantile(said, 1 - FALSE_REFUSALS, axis=0, method="higher"), FLOOR).round(3)
    return arrays | {"limits": limits.astype(np.float64)}


def answers(arrays: dict[str, np.ndarray], small: np.ndarray) -> list[quality_filter.Prediction]:
    weights = {name: value.astype(np.float32) for name, value in arrays.items()}
    return [quality_filter.predict(one, weights) for one in small]


def interval(hits: int, n: int, units: int) -> list[float]:
    """Wilson's 95 % interval of hits / n with `units` independent ones (patients)."""
    if not n:
        return [0.0, 1.0]
    share, z = hits / n, 1.96
    centre, spread = share + z * z / (2 * units), z * np.sqrt(share * (1 - share) / units + (z / (2 * units)) ** 2)
    return [round(float(max(0, (centre + sign * spread) / (1 + z * z / units))), 4) for sign in (-1, 1)]


def row(reasons: list[str | None], images: Images, word: str | None) -> dict:
    """Counts of one group: `word` is what should be said (None: nothing should be)."""
    n, patients = len(reasons), len(set(images.patient.tolist()))
    right = sum(reason is None for reason in reasons) if word is None else sum(reason is not None for reason in reasons)
    named = right if word is None else sum(reason is not None and word in reason for reason in reasons)
    found = {"images": n, "patients": patients, "right": right, "share": round(right / n, 4) if n else None}
    return found | {"interval": interval(right, n, patients), "named_right": named}


def judge(arrays: dict[str, np.ndarray], images: Images) -> dict[str, dict]:
    """By origin: upright chests that pass, the same images inverted and turned that are refused; other kinds refused."""
    limits, table = np.asarray(arrays["limits"], float), {}
    for origin in dict.fromkeys(images.origin.tolist()):
        mine = images.where(images.origin == origin)
        changes = {"as it is": mine.small}
        if mine.chest.all():
            changes |= {"inverted": 255 - mine.small}
            changes |= {TURNS[k - 1]: np.rot90(mine.small, k, (1, 2)) for k in (1, 2, 3)}
        for change, small in changes.items():
            said = [quality_filter.verdict(answer, limits) for answer in answers(arrays, small)]
            word = WORDS[change] if change in WORDS else None if mine.chest.all() else WORDS["not a chest"]
            table[f"{origin}, {change}"] = row(said, mine, word)
    return table


def keep(found: dict) -> None:
    """Write what is there so far; what another half of the run found stays."""
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps(before | found, indent=1) + "\n")


def left_out(images: Images, drawn: dict[str, torch.Tensor], steps: int, seed: int) -> None:
    """What a net says of origins it never saw: the adults' sets, Kermany's children, and each kind of non-chest."""
    found = {}
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
        found[f"trained without {name}"] = judge(arrays, sample(unseen, seed)) | judge(arrays, known)
        show(f"trained without {name}", found[f"trained without {name}"])
        keep({"side_steps": steps, "left_out": found})


def sample(images: Images, seed: int) -> Images:
    """At most UNSEEN images of each origin."""
    order = np.random.default_rng(seed).permutation(len(images.origin))
    kept = [index for name in np.unique(images.origin) for index in order[images.origin[order] == name][:UNSEEN]]
    return images.where(np.isin(np.arange(len(order)), kept))


def show(title: str, table: dict[str, dict]) -> None:
    print(f"\n{title}\n{'':36}{'images':>7}{'patients':>9}{'right':>8}{'95 %':>17}{'named right':>13}")
    for name, cell in table.items():
        low, high = cell["interval"]
        line = f"{name:36}{cell['images']:7}{cell['patients']:9}{cell['share']:8.2%}{low:9.2%} -{high:7.2%}"
        print(f"{line}{cell['named_right']:13}", flush=True)


def measured(images: Images, options: argparse.Namespace) -> dict:
    """What dicom/pixels/quality.npz does on the test part, on drawings and on real DICOM files, limits chosen anew."""
    with np.load(quality_filter.WEIGHTS) as file:
        arrays = limited({name: file[name] for name in file.files}, images, CHESTS)
    np.savez(quality_filter.WEIGHTS, **arrays)
    test = images.where(images.part == "test")
    result = {"steps": options.steps, "seed": options.seed, "torch": torch.__version__}
    result |= {"limits": arrays["limits"].tolist(), "bytes": quality_filter.WEIGHTS.stat().st_size}
    print("limits (not a chest, inverted, rotated)", result["limits"], "bytes", result["bytes"])
    result["held_out"] = judge(arrays, test)
    show("held out patients and images", result["held_out"])
    result["saturated"] = {}
    for name in CHESTS:
        shares = images.clipped[images.origin == name]
        refused = int((shares > quality_filter.CLIPPED).sum())
        result["saturated"][name] = {"images": len(shares), "refused": refused, "most": round(float(shares.max()), 3)}
    print("\nsaturated: images, refused by the rule, largest share clipped", json.dumps(result["saturated"]))
    result["drawings"] = drawings(options.seed)
    print("\ndrawings: share refused", json.dumps(result["drawings"]))
    result["milliseconds"] = times(test.small)
    print("\nms a plate", result["milliseconds"])
    return result | ({"real": real_images(options.dicom)} if options.dicom else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the four sets")
    parser.add_argument("--dicom", type=Path, help="folder of real DICOM files with a manifest.csv")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/quality-images.npz"), help="the decoded small images")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--side-steps", type=int, default=300, help="of each net with something left out")
    parser.add_argument("--only", choices=("measure", "left-out"), help="measure: as it is shipped")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # with the seed, what makes two runs equal
    images, drawn = read_images(options.data, options.cache), net.drawn(options.seed)
    if not options.only:
        np.savez(quality_filter.WEIGHTS, **fit(images, drawn, CHESTS, KINDS, options.steps, options.seed))
    if options.only != "left-out":
        keep(measured(images, options))
    if options.only != "measure":
        left_out(images, drawn, options.side_steps, options.seed)


if __name__ == "__main__":
    main()
