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
COLOURS: dict[str, str] = dict(
    zip(ORDER, ("#888888", "#b08030", "#3a7ca5", "#a04080", "#c0392b", "#2e7d32"), strict=True)
)


class Paired:
    """AUC of many cells on one test, for weights of its images: each cell is a matrix of won pairs."""

    def __init__(self, pool: Pool, at: np.ndarray, seed: int = 7) -> None:
        self.positive, self.negative = pool.truth[at] == 1, pool.truth[at] == 0
        patients = np.unique([pool.samples[i].patient for i in at], return_inverse=True)[1]
        rng = np.random.default_rng(seed)
        drawn = rng.integers(0, patients.max() + 1, (BOOTSTRAPS, patients.max() + 1))
        counts = np.stack([np.bincount(row, minlength=patients.max() + 1) for row in drawn])
        self.weights = np.concatenate([np.ones((1, len(at))), counts[:, patients]])  # the images themselves come first

    def auc(self, scores: np.ndarray) -> np.ndarray:
        """(1 + BOOTSTRAPS,): the AUC, then that of each resampling of patients."""
        high, low = scores[self.positive][:, None], scores[self.negative][None]
        won = (high > low) + 0.5 * (high == low)
        p, n = self.weights[:, self.positive], self.weights[:, self.negative]
        return ((p @ won) * n).sum(1) / np.maximum(p.sum(1) * n.sum(1), 1)


def pairings(pool: Pool) -> Callable[[str, float, int, str], Paired]:
    """The test of a cell, by experiment, share, draw and name; cells that share a test share its resampling."""
    made: dict[bytes, Paired] = {}

    def paired(experiment: str, share: float, seed: int, test: str) -> Paired:
        at = draw(pool, experiment, share, seed).tests[test]
        return made.setdefault(at.tobytes(), Paired(pool, at))

    return paired


def report(pool: Pool, scores: Path, results: Path, floors: Path) -> None:
    """Print the tables; write evolution.json and evolution.png."""
    lines = [json.loads(line) for line in (results / "evolution.jsonl").read_text().splitlines()]
    paired = pairings(pool)
    said: dict = {one: arms(one, lines, scores, paired) for one in ("A", "B", "C")}
    said["ladder"] = ladder(lines, scores, paired)
    said |= {"floors": json.loads(floors.read_text()) if floors.exists() else None}
    (results / "evolution.json").write_text(json.dumps(said, indent=1) + "\n")
    show(said)
    draw_figure(lines, said, results / "evolution.png")


def cells(lines: list[dict], experiment: str, share: float) -> dict[str, dict[int, dict[int, dict]]]:
    """Lines by arm, draw and round."""
    found: dict[str, dict[int, dict[int, dict]]] = {}
    for line in lines:
        if line["experiment"] == experiment and line["share"] == share:
            found.setdefault(line["arm"], {}).setdefault(line["draw"], {})[line["round"]] = line
    return found


def read(scores: Path, experiment: str, arm: str, share: float, seed: int, test: str, number: int) -> np.ndarray:
    name = f"{experiment}-{arm}-{share}-{seed}".replace(" ", "_").replace("/", "_")
    with np.load(scores / f"{name}.npz") as file:
        return file[f"{test}-{number}"]


def interval(differences: np.ndarray, seed: int = 11) -> tuple[float, list[float]]:
    """Mean over draws of (draws, 1 + BOOTSTRAPS) and its two-level 95 % interval."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(differences), (BOOTSTRAPS, len(differences)))
    means = differences[chosen, np.arange(1, BOOTSTRAPS + 1)[:, None]].mean(1)
    return round(float(differences[:, 0].mean()), 4), [round(float(v), 4) for v in np.percentile(means, [2.5, 97.5])]


def arms(experiment: str, lines: list[dict], scores: Path, paired: Callable) -> dict:
    """By share, test and arm: AUC by round, its spread over draws, the paired difference to supervised only, the gap closed."""
    said: dict = {}
    for share in sorted({line["share"] for line in lines if line["experiment"] == experiment}):
        found = cells(lines, experiment, share)
        for test in ("internal", "external"):
            last = {
                arm: {
                    d: paired(experiment, share, d, test).auc(
                        read(scores, experiment, arm, share, d, test, max(rounds))
                    )
                    for d, rounds in of.items()
                }
                for arm, of in found.items()
            }
            table = said.setdefault(str(share), {}).setdefault(test, {})
            for arm in [arm for arm in (*ORDER, *ABLATIONS) if arm in found]:
                draws = sorted(found[arm])
                by_round = {
                    n: round(float(np.mean([found[arm][d][n][test] for d in draws if n in found[arm][d]])), 4)
                    for n in sorted({n for d in draws for n in found[arm][d]})
                }
                ends = np.array([last[arm][d][0] for d in draws])
                row = {
                    "draws": len(draws),
                    "auc_by_round": by_round,
                    "spread": round(float(ends.std(ddof=1)), 4) if len(ends) > 1 else None,
                }
                for other in (
                    "supervised only",
                    "frozen graph",
                    "distl",
                    "distl, another seed",
                    "same steps, no stream",
                ):
                    both = [d for d in draws if other != arm and d in last.get(other, {})]
                    if len(both) > 1:
                        mean, ci = interval(np.array([last[arm][d] - last[other][d] for d in both]))
                        row[f"minus {other}"] = {"mean": mean, "ci": ci, "draws": len(both)}
                base, top = last.get("supervised only", {}), last.get("fully labelled", {})
                both = [d for d in draws if d in base and d in top]
                if both and arm not in ("supervised only", "fully labelled"):
                    gained = np.mean([last[arm][d][0] - base[d][0] for d in both])
                    row["gap_closed"] = round(float(gained / np.mean([top[d][0] - base[d][0] for d in both])), 3)
                if 0 in by_round and arm not in ("supervised only",):
                    row["draws_ending_below_t0"] = int(
                        sum(found[arm][d][max(found[arm][d])][test] < found[arm][d][0][test] for d in draws)
                    )
                table[arm] = row
    return said


def ladder(lines: list[dict], scores: Path, paired: Callable) -> list[dict]:
    """Each rung at T=1: AUC on validation, on which parts are kept, and on the tests; the change to the whole recipe."""
    found = cells(lines, "ladder", 0.01)
    whole = "whole"
    said = []
    for arm, of in found.items():
        draws = sorted(of)
        row: dict = {"arm": arm, "draws": len(draws)}
        for test in ("validation", "internal", "external"):
            row[test] = round(float(np.mean([of[d][1][test] for d in draws])), 4)
        both = [d for d in draws if arm != whole and d in found.get(whole, {})]
        if len(both) > 1:
            change = [of[d][1]["validation"] - found[whole][d][1]["validation"] for d in both]
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
        said.append(row)
    return said


def panels(said: dict) -> Iterator[tuple[str, str, str, dict]]:
    """Experiment, share, test and its arms, of all that was run."""
    for experiment in ("A", "B", "C"):
        for share, by_test in said[experiment].items():
            for test, table in by_test.items():
                yield experiment, share, test, table


def title(experiment: str, share: str) -> str:
    return (
        f"{experiment}, {SEEDS_B} labelled images"
        if experiment == "B"
        else f"{experiment}, {float(share):.0%} labelled"
    )


def show(said: dict) -> None:
    """The tables, as a person reads them."""
    for experiment, share, test, table in panels(said):
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
    if said["ladder"]:
        print("\nladder, 1 % labelled, T=1 (kept or not by validation)")
        for row in said["ladder"]:
            change = row.get("validation minus the whole")
            text = f"{change[0]:+.4f} +- {change[1]:.4f}" if change else ""
            print(
                f"{row['arm']:34} n {row['draws']}  val {row['validation']:.4f} {text:18} internal {row['internal']:.4f} external {row['external']:.4f}"
            )
    print("\nfloors:", json.dumps(said["floors"]))


def draw_figure(lines: list[dict], said: dict, target: Path) -> None:
    """AUC by round for each experiment and test, one line an arm, its draws as thin lines; dotted where draws are missing."""
    columns = list(dict.fromkeys((experiment, share) for experiment, share, _, _ in panels(said)))
    figure, axes = plt.subplots(2, len(columns), figsize=(4.6 * len(columns), 7), sharex=True, squeeze=False)
    for experiment, share, test, table in panels(said):
        ax = axes[int(test == "external")][columns.index((experiment, share))]
        found = cells(lines, experiment, float(share))
        for arm, result in ((arm, table[arm]) for arm in ORDER if arm in table):
            by = result["auc_by_round"]
            if len(by) == 1:
                ax.axhline(next(iter(by.values())), color=COLOURS[arm], ls="--", lw=1.4, label=arm)
                continue
            for rounds in found[arm].values():
                ax.plot(list(rounds), [r[test] for r in rounds.values()], color=COLOURS[arm], lw=0.6, alpha=0.25)
            few = result["draws"] < max(row["draws"] for row in table.values())  # not the mean of all draws: dotted
            ax.plot(
                list(by), list(by.values()), color=COLOURS[arm], lw=1.2 if few else 2.2, ls=":" if few else "-",
                marker="o", ms=4, label=arm,
            )  # fmt: skip
        floor = (said["floors"] or {}).get("pixels", {}).get(f"{experiment} {share}")
        if floor:
            ax.axhline(floor[test], color="#000000", ls=":", lw=1, label="raw 24x24 pixels")
        ax.set_title(f"{title(experiment, share)}, {test}", fontsize=10)
        ax.set_ylabel("AUC")
        ax.grid(alpha=0.25)
        ax.set_xticks(range(4), [f"T={n}" for n in range(4)])
    axes[0][0].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(target, dpi=130)
