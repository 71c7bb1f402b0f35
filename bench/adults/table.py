"""Tables, intervals and the figure of experiment D, from its JSON lines and the scores of its cells.

The interval is two-level: draws are resampled, and patients of the test within them; arms are compared on the same draws
and the same patients. A finding's AUC counts only resamplings that hold both of its classes.
"""

import json
from pathlib import Path

import matplotlib as mpl
import numpy as np

from bench.adults.images import FINDINGS, Adults, divide

mpl.use("Agg")
import matplotlib.pyplot as plt

BOOTSTRAPS = 1000
SUPERVISED, DEFAULT, FULL = "supervised only", "default", "fully labelled"
ORDER = (SUPERVISED, "pseudo-label", "frozen graph", "distl", "same steps, no stream", DEFAULT, FULL)
COLOURS = dict(zip(ORDER, ("#888888", "#b08030", "#a04080", "#3a7ca5", "#555599", "#c0392b", "#2e7d32"), strict=True))
ROWS = ("macro", *FINDINGS)
VIEWS = ("all", "PA", "AP")
WORSE = 0.005  # macro AUC below its own T=0 that counts as a loss


class Test:
    """The test images of one view, and the AUC of scores on them and on resamplings of their patients."""

    def __init__(self, adults: Adults, at: np.ndarray, view: str, seed: int = 7) -> None:
        self.rows = np.flatnonzero((adults.view[at] == view) | (view == "all"))
        places = at[self.rows]
        self.truth = adults.truth[places]
        self.weights = resampled([adults.samples[i].patient for i in places], seed)

    def auc(self, scores: np.ndarray) -> np.ndarray:
        """Return float [1 + BOOTSTRAPS, 1 + F]: macro AUC and the AUC of each finding; row 0 without resampling.

        scores [N, F] of all test images; nan where a resampling lacks a class; macro = mean over known findings.
        """
        by_finding = weighted_auc(scores[self.rows], self.truth, self.weights)
        return np.concatenate([np.nanmean(by_finding, 1, keepdims=True), by_finding], 1)


def resampled(patients: list[str], seed: int) -> np.ndarray:
    """Return weights of images, float [1 + BOOTSTRAPS, N]: 1, then how often each image's patient was drawn."""
    own, rng = np.unique(patients, return_inverse=True)[1], np.random.default_rng(seed)
    number = own.max() + 1
    counts = [np.bincount(rng.integers(0, number, number), minlength=number) for _ in range(BOOTSTRAPS)]
    return np.concatenate([np.ones((1, len(own))), np.stack(counts)[:, own]])


def weighted_auc(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the AUC of each finding [R, F] for each row of weights [R, N]; nan where a class has no weight.

    scores [N, F]; truth [N, F] of 1 and 0.
    """
    columns = []
    for i in range(truth.shape[1]):
        positive, negative = truth[:, i] == 1, truth[:, i] == 0
        high, low = scores[positive, i][:, None], scores[negative, i][None]
        won = (high > low) + 0.5 * (high == low)
        p, n = weights[:, positive], weights[:, negative]
        mass = p.sum(1) * n.sum(1)
        columns.append(np.where(mass > 0, ((p @ won) * n).sum(1) / np.maximum(mass, 1), np.nan))
    return np.stack(columns, 1)


def interval(differences: np.ndarray, seed: int = 11) -> tuple[float, list[float]]:
    """Return the mean over draws of float [draws, 1 + BOOTSTRAPS], and its two-level 95 % interval."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(differences), (BOOTSTRAPS, len(differences)))
    means = np.nanmean(differences[chosen, np.arange(1, BOOTSTRAPS + 1)[:, None]], 1)
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return round(float(differences[:, 0].mean()), 4), [round(float(low), 4), round(float(high), 4)]


def report(adults: Adults, scores: Path, results: Path) -> None:
    """Print the tables of all finished cells; write adults.json and adults.png."""
    lines = [json.loads(line) for line in (results / "adults.jsonl").read_text().splitlines()]
    settings = sorted({(line["labels"], line["mednist"]) for line in lines})
    tables = {}
    for labels, mednist in settings:
        cells = [line for line in lines if (line["labels"], line["mednist"]) == (labels, mednist)]
        tables[f"{labels} labels" + ", MedNIST in the stream" * mednist] = table(adults, cells, scores)
    (results / "adults.json").write_text(json.dumps(tables, indent=1) + "\n")
    show(tables)
    draw_figure(tables, results / "adults.png")


def table(adults: Adults, cells: list[dict], scores: Path) -> dict:
    """Return by view and arm: mean AUC by round, paired differences to supervised only, share of the gap closed."""
    labels, mednist = cells[0]["labels"], cells[0]["mednist"]
    by_arm: dict[str, dict[int, dict[int, dict]]] = {}
    for line in cells:
        by_arm.setdefault(line["arm"], {}).setdefault(line["draw"], {})[line["round"]] = line
    division = divide(adults, labels, 0, mednist)
    result: dict = {}
    for view in VIEWS:
        test = Test(adults, division.test, view)
        last, by_round = {}, {}
        for arm, draws in by_arm.items():
            read = {
                (d, n): test.auc(np.load(scores / f"{cell_name(rounds[n])}.npz")[f"test-{n}"])
                for d, rounds in draws.items()
                for n in rounds
            }
            last[arm] = {d: read[d, max(rounds)] for d, rounds in draws.items()}
            numbers = sorted({n for rounds in draws.values() for n in rounds})
            by_round[arm] = {n: np.mean([read[d, n][0] for d in draws if (d, n) in read], 0) for n in numbers}
        result[view] = {arm: row(arm, by_arm, by_round, last) for arm in by_arm}
    return result


def cell_name(line: dict) -> str:
    """Return the name of a cell's file of scores."""
    parts = (line["arm"], line["labels"], line["mednist"], line["draw"])
    return "-".join(map(str, parts)).replace(" ", "_").replace(",", "")


def row(arm: str, by_arm: dict, by_round: dict, last: dict) -> dict:
    """Return one row of the table."""
    found: dict = {
        "draws": len(by_arm[arm]),
        "auc_by_round": {n: dict(zip(ROWS, np.round(v, 4).tolist(), strict=True)) for n, v in by_round[arm].items()},
        "draws that end below their T=0": ends_below(by_arm[arm]),
    }
    if SUPERVISED not in last or arm == SUPERVISED:
        return found
    both = sorted(set(last[arm]) & set(last[SUPERVISED]))
    if len(both) > 1:
        differences = np.stack([last[arm][d] - last[SUPERVISED][d] for d in both])
        found["minus supervised only"] = {
            name: dict(zip(("mean", "ci"), interval(differences[:, :, i]), strict=True)) for i, name in enumerate(ROWS)
        }
        shared = sorted(set(both) & set(last.get(FULL, {})))
        if shared:
            mean = {name: np.mean([last[name][d][0] for d in shared], 0) for name in (arm, SUPERVISED, FULL)}
            gap = mean[FULL] - mean[SUPERVISED]
            closed = (mean[arm] - mean[SUPERVISED]) / np.where(np.abs(gap) > 1e-6, gap, np.nan)
            found["gap closed"] = {name: round(float(v), 3) for name, v in zip(ROWS, closed, strict=True)}
    return found


def ends_below(draws: dict) -> int | None:
    """Return the number of draws whose last macro AUC is below that of T=0 by more than WORSE; None without rounds."""
    ended = [
        (rounds[0]["macro"], rounds[max(rounds)]["macro"]) for rounds in draws.values() if 0 in rounds and max(rounds)
    ]
    return sum(end < first - WORSE for first, end in ended) if ended else None


def show(tables: dict) -> None:
    """Print the tables."""
    for setting, by_view in tables.items():
        for view, rows in by_view.items():
            print(f"\n{setting}, view {view}")
            for arm in sorted(rows, key=lambda arm: ORDER.index(arm) if arm in ORDER else len(ORDER)):
                found = rows[arm]
                rounds = " ".join(
                    f"T={n} {v['macro']:.3f}/{v['abnormal']:.3f}" for n, v in found["auc_by_round"].items()
                )
                text = f"{arm:30} n={found['draws']} macro/abnormal {rounds}"
                for name in ("macro", "abnormal"):
                    if "minus supervised only" in found:
                        d = found["minus supervised only"][name]
                        text += f"  {name} {d['mean']:+.3f} [{d['ci'][0]:+.3f}, {d['ci'][1]:+.3f}]"
                    if "gap closed" in found:
                        text += f" gap {found['gap closed'][name]:.2f}"
                print(text)


def draw_figure(tables: dict, target: Path) -> None:
    """Draw macro AUC and AUC of abnormal by round: a line for each arm."""
    figure, axes = plt.subplots(2, len(tables), figsize=(4.8 * len(tables), 7), sharex=True, squeeze=False)
    for column, (setting, by_view) in enumerate(tables.items()):
        for ax, name in zip((axes[0][column], axes[1][column]), ("macro", "abnormal"), strict=True):
            for arm in (arm for arm in ORDER if arm in by_view["all"]):
                by = {n: v[name] for n, v in by_view["all"][arm]["auc_by_round"].items()}
                if len(by) == 1 or arm == FULL:
                    ax.axhline(list(by.values())[-1], color=COLOURS[arm], ls="--", lw=1.4, label=arm)
                else:
                    ax.plot(list(by), list(by.values()), color=COLOURS[arm], lw=2, marker="o", ms=4, label=arm)
            ax.set_title(f"{setting}, {name}", fontsize=10)
            ax.set_ylabel("AUC")
            ax.grid(alpha=0.25)
            ax.set_xticks(range(4), [f"T={n}" for n in range(4)])
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target, dpi=130)
