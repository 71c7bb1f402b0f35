"""Tables, intervals and the figure of the evolution bench, from its JSON lines and the scores of its cells.

The interval is two-level: draws are resampled, and patients of the test within them, 2,000 times; arms are compared on
the same draws and the same patients.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib as mpl
import numpy as np

from bench.learning.evolution_images import SEEDS_B, Pool, draw

mpl.use("Agg")
import matplotlib.pyplot as plt

BOOTSTRAPS = 2000
ORDER = ("supervised only", "pseudo-label", "frozen graph", "distl", "evolve", "fully labelled")
ABLATIONS = (
    "distl, no correction",
    "distl, self-training only",
    "distl, self-supervised only",
    "same steps, no stream",
    "distl, another seed",
    "evolve, another seed",
)  # in the tables, not in the figure
# arms that every other arm is compared with, on the same draws and patients
REFERENCES = ("supervised only", "frozen graph", "distl", "distl, another seed", "same steps, no stream")
COLOURS: dict[str, str] = dict(
    zip(ORDER, ("#888888", "#b08030", "#3a7ca5", "#a04080", "#c0392b", "#2e7d32"), strict=True)
)


class Paired:
    """AUC of many cells on one test, for the test's images and for BOOTSTRAPS resamplings of its patients."""

    def __init__(self, pool: Pool, at: np.ndarray, seed: int = 7) -> None:
        self.positive, self.negative = pool.truth[at] == 1, pool.truth[at] == 0
        patients = np.unique([pool.samples[i].patient for i in at], return_inverse=True)[1]
        rng = np.random.default_rng(seed)
        drawn = rng.integers(0, patients.max() + 1, (BOOTSTRAPS, patients.max() + 1))
        counts = np.stack([np.bincount(row, minlength=patients.max() + 1) for row in drawn])
        self.weights = np.concatenate(
            [np.ones((1, len(at))), counts[:, patients]]
        )  # row 0: the images without resampling

    def auc(self, scores: np.ndarray) -> np.ndarray:
        """Return float [1 + BOOTSTRAPS]: the AUC, then the AUC of each resampling of patients."""
        high, low = scores[self.positive][:, None], scores[self.negative][None]
        won = (high > low) + 0.5 * (high == low)
        p, n = self.weights[:, self.positive], self.weights[:, self.negative]
        return ((p @ won) * n).sum(1) / np.maximum(p.sum(1) * n.sum(1), 1)


def pairings(pool: Pool) -> Callable[[str, float, int, str], Paired]:
    """Return a function from (experiment, share, draw, test) to the test; cells with one test share its resampling."""
    made: dict[bytes, Paired] = {}

    def paired(experiment: str, share: float, seed: int, test: str) -> Paired:
        at = draw(pool, experiment, share, seed).tests[test]
        return made.setdefault(at.tobytes(), Paired(pool, at))

    return paired


def report(pool: Pool, scores: Path, results: Path, floors: Path) -> None:
    """Print the tables; write evolution.json and evolution.png."""
    lines = [json.loads(line) for line in (results / "evolution.jsonl").read_text().splitlines()]
    paired = pairings(pool)
    tables: dict = {experiment: arms(experiment, lines, scores, paired) for experiment in ("A", "B", "C")}
    tables["ladder"] = ladder(lines, scores, paired)
    tables |= {"floors": json.loads(floors.read_text()) if floors.exists() else None}
    (results / "evolution.json").write_text(json.dumps(tables, indent=1) + "\n")
    show(tables)
    draw_figure(lines, tables, results / "evolution.png")


def cells(lines: list[dict], experiment: str, share: float) -> dict[str, dict[int, dict[int, dict]]]:
    """Return the lines by arm, draw and round."""
    by_arm: dict[str, dict[int, dict[int, dict]]] = {}
    for line in lines:
        if line["experiment"] == experiment and line["share"] == share:
            by_arm.setdefault(line["arm"], {}).setdefault(line["draw"], {})[line["round"]] = line
    return by_arm


def read(scores: Path, experiment: str, arm: str, share: float, seed: int, test: str, number: int) -> np.ndarray:
    """Return the scores of a cell on a test after round `number`."""
    name = f"{experiment}-{arm}-{share}-{seed}".replace(" ", "_").replace("/", "_")
    with np.load(scores / f"{name}.npz") as file:
        return file[f"{test}-{number}"]


def interval(differences: np.ndarray, seed: int = 11) -> tuple[float, list[float]]:
    """Return the mean over draws of float [draws, 1 + BOOTSTRAPS], and its two-level 95 % interval."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(differences), (BOOTSTRAPS, len(differences)))
    means = differences[chosen, np.arange(1, BOOTSTRAPS + 1)[:, None]].mean(1)
    return round(float(differences[:, 0].mean()), 4), [round(float(v), 4) for v in np.percentile(means, [2.5, 97.5])]


def arms(experiment: str, lines: list[dict], scores: Path, paired: Callable) -> dict:
    """Return by share, test and arm: AUC by round, spread over draws, paired differences, gap closed."""
    tables: dict = {}
    for share in sorted({line["share"] for line in lines if line["experiment"] == experiment}):
        by_arm = cells(lines, experiment, share)
        for test in ("internal", "external"):
            last = {
                arm: {
                    d: paired(experiment, share, d, test).auc(
                        read(scores, experiment, arm, share, d, test, max(rounds))
                    )
                    for d, rounds in by_draw.items()
                }
                for arm, by_draw in by_arm.items()
            }
            shown = [arm for arm in (*ORDER, *ABLATIONS) if arm in by_arm]
            tables.setdefault(str(share), {})[test] = {arm: arm_row(arm, by_arm[arm], last, test) for arm in shown}
    return tables


def arm_row(arm: str, by_draw: dict[int, dict[int, dict]], last: dict[str, dict], test: str) -> dict:
    """Return one row of a table; `last` holds the resampled AUCs of every arm and draw after the last round."""
    draws, own = sorted(by_draw), last[arm]
    by_round = {
        n: round(float(np.mean([by_draw[d][n][test] for d in draws if n in by_draw[d]])), 4)
        for n in sorted({n for d in draws for n in by_draw[d]})
    }
    ends = np.array([own[d][0] for d in draws])
    spread = round(float(ends.std(ddof=1)), 4) if len(ends) > 1 else None
    row: dict = {"draws": len(draws), "auc_by_round": by_round, "spread": spread}
    for reference in REFERENCES:
        both = [d for d in draws if reference != arm and d in last.get(reference, {})]
        if len(both) > 1:
            mean, ci = interval(np.array([own[d] - last[reference][d] for d in both]))
            row[f"minus {reference}"] = {"mean": mean, "ci": ci, "draws": len(both)}
    base, top = last.get("supervised only", {}), last.get("fully labelled", {})
    both = [d for d in draws if d in base and d in top]
    if both and arm not in ("supervised only", "fully labelled"):
        gained = np.mean([own[d][0] - base[d][0] for d in both])
        row["gap_closed"] = round(float(gained / np.mean([top[d][0] - base[d][0] for d in both])), 3)
    if 0 in by_round and arm != "supervised only":
        below = sum(by_draw[d][max(by_draw[d])][test] < by_draw[d][0][test] for d in draws)
        row["draws_ending_below_t0"] = int(below)
    return row


def ladder(lines: list[dict], scores: Path, paired: Callable) -> list[dict]:
    """Return each rung at T=1: AUC on validation, which decides, and on the tests; the difference to the whole recipe."""
    by_arm = cells(lines, "ladder", 0.01)
    whole = "whole"
    rungs = []
    for arm, of in by_arm.items():
        draws = sorted(of)
        row: dict = {"arm": arm, "draws": len(draws)}
        for test in ("validation", "internal", "external"):
            row[test] = round(float(np.mean([of[d][1][test] for d in draws])), 4)
        both = [d for d in draws if arm != whole and d in by_arm.get(whole, {})]
        if len(both) > 1:
            change = [of[d][1]["validation"] - by_arm[whole][d][1]["validation"] for d in both]
            row["validation minus the whole"] = [
                round(float(np.mean(change)), 4),
                round(float(np.std(change, ddof=1) / len(both) ** 0.5), 4),
            ]
            test = {d: paired("A", 0.01, d, "internal") for d in both}
            differences = [
                test[d].auc(read(scores, "ladder", arm, 0.01, d, "internal", 1))
                - test[d].auc(read(scores, "ladder", whole, 0.01, d, "internal", 1))
                for d in both
            ]
            row["internal minus the whole"] = dict(zip(("mean", "ci"), interval(np.array(differences)), strict=True))
        rungs.append(row)
    return rungs


def panels(tables: dict) -> Iterator[tuple[str, str, str, dict]]:
    """Yield experiment, share, test and table of everything that was run."""
    for experiment in ("A", "B", "C"):
        for share, by_test in tables[experiment].items():
            for test, table in by_test.items():
                yield experiment, share, test, table


def title(experiment: str, share: str) -> str:
    """Return the title of a panel."""
    return (
        f"{experiment}, {SEEDS_B} labelled images"
        if experiment == "B"
        else f"{experiment}, {float(share):.0%} labelled"
    )


def show(tables: dict) -> None:
    """Print the tables."""
    for experiment, share, test, table in panels(tables):
        print(f"\n{title(experiment, share)}, {test} test")
        print(
            f"{'arm':28} {'n':>2}  {'T=0':>6} {'T=1':>6} {'T=2':>6} {'T=3':>6}  spread   minus supervised only        gap closed"
        )
        for arm, row in table.items():
            by = [f"{row['auc_by_round'][n]:.3f}" if n in row["auc_by_round"] else "" for n in range(4)]
            paired = row.get("minus supervised only")
            text = f"{paired['mean']:+.3f} [{paired['ci'][0]:+.3f}, {paired['ci'][1]:+.3f}]" if paired else ""
            gap = f"{row['gap_closed']:.2f}" if "gap_closed" in row else ""
            spread = f"{row['spread']:.3f}" if row["spread"] is not None else ""
            print(
                f"{arm:28} {row['draws']:2}  " + " ".join(f"{v:>6}" for v in by) + f"  {spread:>6}   {text:27} {gap:>6}"
            )
    if tables["ladder"]:
        print("\nladder, 1 % labelled, T=1 (kept or not by validation)")
        for row in tables["ladder"]:
            change = row.get("validation minus the whole")
            text = f"{change[0]:+.4f} +- {change[1]:.4f}" if change else ""
            print(
                f"{row['arm']:34} n {row['draws']}  val {row['validation']:.4f} {text:18} internal {row['internal']:.4f} external {row['external']:.4f}"
            )
    print("\nfloors:", json.dumps(tables["floors"]))


def draw_figure(lines: list[dict], tables: dict, target: Path) -> None:
    """Draw AUC by round for each experiment and test: a line for each arm, thin lines for its draws."""
    columns = list(dict.fromkeys((experiment, share) for experiment, share, _, _ in panels(tables)))
    figure, axes = plt.subplots(2, len(columns), figsize=(4.6 * len(columns), 7), sharex=True, squeeze=False)
    for experiment, share, test, table in panels(tables):
        ax = axes[int(test == "external")][columns.index((experiment, share))]
        by_arm = cells(lines, experiment, float(share))
        for arm, result in ((arm, table[arm]) for arm in ORDER if arm in table):
            by = result["auc_by_round"]
            if len(by) == 1:
                ax.axhline(next(iter(by.values())), color=COLOURS[arm], ls="--", lw=1.4, label=arm)
                continue
            for rounds in by_arm[arm].values():
                ax.plot(list(rounds), [r[test] for r in rounds.values()], color=COLOURS[arm], lw=0.6, alpha=0.25)
            few = result["draws"] < max(row["draws"] for row in table.values())  # dotted: not the mean of all draws
            ax.plot(
                list(by), list(by.values()), color=COLOURS[arm], lw=1.2 if few else 2.2, ls=":" if few else "-",
                marker="o", ms=4, label=arm,
            )  # fmt: skip
        floor = (tables["floors"] or {}).get("pixels", {}).get(f"{experiment} {share}")
        if floor:
            ax.axhline(floor[test], color="#000000", ls=":", lw=1, label="raw 24x24 pixels")
        ax.set_title(f"{title(experiment, share)}, {test}", fontsize=10)
        ax.set_ylabel("AUC")
        ax.grid(alpha=0.25)
        ax.set_xticks(range(4), [f"T={n}" for n in range(4)])
    axes[0][0].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(target, dpi=130)
