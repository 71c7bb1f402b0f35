"""Bio-creep under five policies, the true level of the gate's test, and the power of a golden set.

Simulated scores, decided by the gate's own functions (`learner.evaluation.auc`); `judge` must agree at every 97th
decision. The simulation shows how the rules behave if the normal model holds. It does not cover any real model, image
or hospital.

    python bench/learning/creep.py [--runs 200] [--draws 20000] [--jobs 2] [--out bench/results/creep.json]
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import NormalDist

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.common import results
from learner.evaluation import auc as stats
from learner.evaluation.gate import Golden, Rules, Scores, alpha_per_evaluation, judge

ROUNDS, START, MARGIN = 60, 0.92, 0.02
DRIFT, SPREAD = -0.003, 0.006  # nightly change in true AUC: slightly worse on average, like retraining on drift
POSITIVE, NEGATIVE = 150, 850
SHARED = 0.95  # correlation of two models' scores, given the label
NORMAL = NormalDist()
EVALUATIONS = {"one": 1, "weekly": 52, "nightly": 365}
POLICIES = {
    "non-inferior to the last champion only": (0.05, ("champion",), False),
    "+ non-inferior to the locked baseline": (0.05, ("champion", "baseline"), False),
    "+ an alpha budget over all evaluations": (alpha_per_evaluation(0.05, ROUNDS), ("champion", "baseline"), False),
    "superiority only": (0.05, ("champion",), True),
    "the gate: baseline, budget and superiority": (alpha_per_evaluation(0.05, ROUNDS), ("champion", "baseline"), True),
}


def scores(
    rng: np.random.Generator, labels: np.ndarray, level: float, shared: np.ndarray, part: float = SHARED
) -> np.ndarray:
    """Return float [N]: binormal, true AUC `level`, correlation `part` with other models of the same `shared`."""
    own = rng.standard_normal(len(labels))
    return sqrt(part) * shared + sqrt(1 - part) * own + labels * sqrt(2) * NORMAL.inv_cdf(level)


def year(run: int, policy: str, seed: int) -> dict[str, float]:
    """Simulate 60 rounds on one golden set: final true AUC, approvals, number of decisions checked with `judge`."""
    alpha, held, superior = POLICIES[policy]
    rng = np.random.default_rng([seed, run])  # the same golden set and random numbers for every policy
    labels = np.r_[np.ones(POSITIVE), np.zeros(NEGATIVE)]
    samples = np.arange(len(labels))
    shared = rng.standard_normal(len(labels))
    raw = {
        model: scores(np.random.default_rng([seed, run, 1]), labels, START, shared)
        for model in ("champion", "baseline")
    }
    curves = {model: stats.curve(s, labels, samples, len(samples)) for model, s in raw.items()}
    z, level, approved, checked = NORMAL.inv_cdf(1 - alpha), START, 0, 0
    for step in range(ROUNDS):
        proposed = min(max(level + rng.normal(DRIFT, SPREAD), 0.5), 0.999)
        fresh = scores(rng, labels, proposed, shared)
        mine = stats.curve(fresh, labels, samples, len(samples))
        noninferior = all(float(stats.statistic(mine, curves[model], -MARGIN)) > z for model in held)
        better = float(stats.statistic(mine, curves["champion"], 0.0)) > z
        if (run * ROUNDS + step) % 97 == 0:
            checked += 1
            assert agrees(fresh, raw, labels, held, alpha) == noninferior
        if (noninferior or held == ("champion",)) and (better if superior else noninferior):
            raw["champion"], curves["champion"], level, approved = fresh, mine, proposed, approved + 1
    return {"final": level, "approved": approved, "checked": checked}


def agrees(
    fresh: np.ndarray, raw: dict[str, np.ndarray], labels: np.ndarray, held: tuple[str, ...], alpha: float
) -> bool:
    """Return whether `judge` finds the candidate non-inferior to every reference of the policy."""
    golden = Golden(labels[:, None], [f"p{i}" for i in range(len(labels))], ("finding",))
    champion, baseline, own = (Scores(1 / (1 + np.exp(-s[:, None]))) for s in (raw["champion"], raw["baseline"], fresh))
    verdict = judge(own, champion, baseline, golden, Rules(margin=MARGIN), alpha, {"1": 0.0})
    rows = [c for c in verdict.checks if c.name.removeprefix("vs ") in held]
    return all(c.outcome in ("non_inferior", "better") for c in rows)


def level(case: tuple[float, int], draws: int, seed: int, alpha: float) -> dict[str, float]:
    """Return the share of candidates exactly at the margin that pass as non-inferior, by the plain and logit tests."""
    value, positive = case
    rng = np.random.default_rng([seed, int(value * 1000), positive])
    labels = np.r_[np.ones(positive), np.zeros(round(positive * NEGATIVE / POSITIVE))]
    samples, z, plain, logit = np.arange(len(labels)), NORMAL.inv_cdf(1 - alpha), 0, 0
    for _ in range(draws):
        shared = rng.standard_normal(len(labels))
        worse = stats.curve(scores(rng, labels, value - MARGIN, shared), labels, samples, len(samples))
        champion = stats.curve(scores(rng, labels, value, shared), labels, samples, len(samples))
        spread = worse.variance + champion.variance - 2 * stats.covariance(worse, champion)
        plain += worse.value - champion.value + MARGIN > z * sqrt(spread)
        logit += float(stats.statistic(worse, champion, -MARGIN)) > z
    error = sqrt(alpha * (1 - alpha) / draws)
    return {"auc": value, "positives": positive, "plain": plain / draws, "logit": logit / draws, "error": error}


def powers(case: tuple[float, int], draws: int, seed: int) -> dict[str, object]:
    """Return the power without any change (AUC .91), for one, weekly and nightly evaluations a year.

    `power`: share of evaluations that show non-inferiority; `promised`: mean of `learner.evaluation.auc.power`, from
    each draw's own variance and correlation.
    """
    correlation, positive = case
    rng = np.random.default_rng([seed, 7, int(100 * correlation), positive])
    labels = np.r_[np.ones(positive), np.zeros(round(positive * NEGATIVE / POSITIVE))]
    samples, shown, promised, measured = (
        np.arange(len(labels)),
        dict.fromkeys(EVALUATIONS, 0),
        dict.fromkeys(EVALUATIONS, 0.0),
        0.0,
    )
    for _ in range(draws):
        shared = rng.standard_normal(len(labels))
        a, b = (
            stats.curve(scores(rng, labels, 0.91, shared, correlation), labels, samples, len(samples)) for _ in range(2)
        )
        z, r = float(stats.statistic(a, b, -MARGIN)), stats.correlation(a, b)
        measured += r / draws
        for name, count in EVALUATIONS.items():
            alpha = alpha_per_evaluation(0.05, count)
            shown[name] += z > -NORMAL.inv_cdf(alpha)
            promised[name] += stats.power(b.value, b.variance, r, MARGIN, alpha) / draws
    return {
        "scores": correlation,
        "aucs": measured,
        "positives": positive,
        "power": {name: count / draws for name, count in shown.items()},
        "promised": promised,
    }


def creep(pool: ProcessPoolExecutor, runs: int, seed: int) -> list[dict[str, object]]:
    """Simulate every policy, print and return the table."""
    print(f"{runs} years of {ROUNDS} rounds, {POSITIVE}+ / {NEGATIVE}-, {DRIFT:+} ± {SPREAD} a round, margin {MARGIN}")
    print(f"{'policy':46} {'alpha':>8} {'final true AUC':>14} {'below start - margin':>21} {'approvals':>10}")
    table: list[dict[str, object]] = []
    for policy, (alpha, _, _) in POLICIES.items():
        years = list(pool.map(partial(year, policy=policy, seed=seed), range(runs), chunksize=5))
        final = np.array([y["final"] for y in years])
        auc, below = float(final.mean()), float((final < START - MARGIN).mean())
        approvals, agreed = float(np.mean([y["approved"] for y in years])), int(sum(y["checked"] for y in years))
        row = {"policy": policy, "alpha": alpha, "final_auc": auc, "below": below, "approvals": approvals}
        table.append({**row, "judge_asked_and_agreed": agreed})
        print(f"{policy:46} {alpha:8.5f} {auc:14.3f} {below:21.0%} {approvals:10.1f}", flush=True)
    return table


def main() -> None:
    """Simulate, print and write."""
    parser = results.parser(__doc__, "creep.json")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--draws", type=int, default=20000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began, weekly = time.monotonic(), alpha_per_evaluation(0.05, 52)
    with ProcessPoolExecutor(options.jobs) as pool:
        policies = creep(pool, options.runs, options.seed)
        print(f"\ntrue level at nominal {weekly:.5f}: candidate exactly at the margin, {options.draws} draws a row")
        print(f"{'AUC':>5} {'positives':>10} {'plain DeLong':>13} {'logit':>9} {'± (1 sd)':>9}")
        levels, cases = [], [(value, m) for value in (0.91, 0.97) for m in (50, 100, 200)]
        for row in pool.map(partial(level, draws=options.draws, seed=options.seed, alpha=weekly), cases):
            levels.append(row)
            print("{auc:5.2f} {positives:10} {plain:13.5f} {logit:9.5f} {error:9.5f}".format(**row), flush=True)
        print("\npower of one evaluation without any change, AUC .91 (in brackets: the value of `golden power`)")
        print(f"{'scores':>7} {'AUCs':>6} {'positives':>10}" + "".join(f"{name:>16}" for name in EVALUATIONS))
        power, cases = [], [(r, m) for r in (0.95, 0.85) for m in (50, 100, 200, 400)]
        for row in pool.map(partial(powers, draws=options.draws // 20, seed=options.seed), cases):
            power.append(row)
            cells = "".join(f"{row['power'][name]:9.0%} ({row['promised'][name]:4.0%})" for name in EVALUATIONS)
            print(f"{row['scores']:7.2f} {row['aucs']:6.2f} {row['positives']:10}{cells}", flush=True)
    result = {"runs": options.runs, "draws": options.draws, "seed": options.seed, "rounds": ROUNDS, "margin": MARGIN}
    result |= {"policies": policies, "levels": levels, "power": power}
    results.write(options.out, result)
    print(f"\nwritten to {options.out} in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
