"""The gate: judge whether a candidate may replace the champion. A pure function of scores, labels and the site's rules.

The candidate must be non-inferior to the champion and to the locked baseline on every required finding (an
intersection-union test, so alpha is not split), better on some finding where the site requires it (Holm), with sane
scores and torch/ONNX parity. The gate reads no file and spends no budget: the agent records the evaluation before it
calls. Must import numpy and the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, isfinite, isnan, sqrt

import numpy as np

from learner.evaluation import auc as stats
from learner.evaluation.auc import Curve, alpha_per_evaluation, auc, power
from learner.evaluation.floor import against_floor
from learner.evaluation.floor import line as floor_line
from learner.evaluation.label_table import Columns, LabelTable, more_patients
from learner.evaluation.verdict import Check, Golden, Rules, Scores, Verdict, conclude

__all__ = [
    "Check",
    "Golden",
    "Power",
    "Rules",
    "Scores",
    "Verdict",
    "alpha_per_evaluation",
    "auc",
    "golden_power",
    "judge",
]

WANTED_POWER = 0.8  # "needs N more patients" is computed for this power
CONSTANT = "the same score for every image: label train images of both classes, or remove this finding"
Pairs = dict[str, tuple[Curve, Curve]]  # finding -> candidate, reference


def judge(
    candidate: Scores,
    champion: Scores,
    baseline: Scores,
    golden: Golden,
    rules: Rules,
    alpha: float,
    parity: Mapping[str, float] | None,
    measured: Sequence[Check] = (),
    floor: Scores | None = None,
) -> Verdict:
    """Return the verdict of one evaluation at one-sided level `alpha`.

    `parity`: the largest difference in probability between torch and ONNX, by batch size (or "probe"); the key "images" is
    a count; None fails, because parity was not measured. `measured`: checks from elsewhere (operating point, subgroups,
    replay), which count like the gate's own. `floor`: scores of raw pixels (nan = not fitted); their rows "vs raw pixels"
    and their words in the line never change the outcome. ValueError for scores that do not fit the golden set, for a
    reference with scores that are not finite, and for a finding in must_show that the golden set does not have.
    """
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha {alpha}: need a one-sided level between 0 and 0.5")
    table = LabelTable(golden)
    stray = [f for f in rules.must_show if f not in table.findings]
    if stray:
        raise ValueError(f"must_show {stray[0]!r}: not a finding of the golden set; it has {', '.join(table.findings)}")
    own = table.columns(candidate, "candidate")
    old, first = table.reference(champion, "champion"), table.reference(baseline, "baseline")
    pairs, against = _compare("vs champion", own, old, table, rules, alpha)
    _, locked = _compare("vs baseline", own, first, table, rules, alpha)
    against, somewhere = _superior(pairs, against, rules, alpha)
    checks = (*against, *locked, somewhere, *_sanity(own, table, rules), _parity(parity, rules), *measured)
    must = rules.must_show or tuple(f for f in table.findings if f in own and f in old and f in first)
    outcome, line = conclude(checks, must, rules)
    if floor is not None:  # after the conclusion: these rows decide nothing
        beside = against_floor(candidate, floor, table, rules.min_shown)
        checks, line = (*checks, *beside), f"{line}; {floor_line(beside)}"
    return Verdict(outcome, checks, line, alpha, rules.margin)


# ------------------------------------------------------------------------------------------ checks 1 and 2: non-inferior, better


def _compare(
    name: str, own: Columns, reference: Columns, table: LabelTable, rules: Rules, alpha: float
) -> tuple[Pairs, list[Check]]:
    """Return the curves of the findings with enough patients to decide on, and a check for each golden finding."""
    pairs: Pairs = {}
    rows: list[Check] = []
    for finding in table.findings:
        m, n = table.counts(finding)
        lack = rules.min_class - min(m, n)
        row = Check(
            name, finding, None, None, f"lower bound > {-rules.margin:g}", "inconclusive", positives=m, negatives=n
        )
        if finding not in own or finding not in reference:
            who = "candidate" if finding not in own else name.removeprefix("vs ")
            rows.append(replace(row, note=f"the {who} has no score for it"))
        elif not np.isfinite(own[finding]).all():
            rows.append(replace(row, note="scores are not finite"))
        elif min(m, n) < 2:
            rows.append(replace(row, needs=lack, note=more_patients(lack)))
        else:
            a, b = table.curve(finding, own[finding]), table.curve(finding, reference[finding])
            row = replace(row, observed=a.value - b.value, candidate=a.value, reference=b.value)
            if lack <= 0:
                pairs[finding] = a, b
                row = _decided(replace(row, ci=stats.interval(a, b, alpha)), a, b, rules, alpha)
            else:
                ci = stats.interval(a, b, alpha) if min(m, n) >= rules.min_shown else None
                row = replace(row, ci=ci, needs=lack, note=more_patients(lack))
            rows.append(row)
    return pairs, rows


def _decided(row: Check, a: Curve, b: Curve, rules: Rules, alpha: float) -> Check:
    """Return `row` with its outcome; "better" is left to `_superior`."""
    assert row.ci is not None and row.positives is not None and row.negatives is not None
    low, high = row.ci
    if low > -rules.margin:
        return replace(row, outcome="non_inferior")
    if high < -rules.margin:
        return replace(row, outcome="worse")
    r, fewer = stats.correlation(a, b), min(row.positives, row.negatives)
    margin = stats.gap(b.level, b.variance, 0.0 if isnan(r) else r, rules.margin)
    wanted = (stats.NORMAL.inv_cdf(WANTED_POWER) - stats.NORMAL.inv_cdf(alpha)) / margin
    needs = max(ceil(fewer * (wanted**2 - 1)), 0) or None
    chance = stats.NORMAL.cdf(margin + stats.NORMAL.inv_cdf(alpha))
    note = f"power {chance:.0%} if there is no difference" + (
        f"; {WANTED_POWER:.0%} {more_patients(needs)}" if needs else ""
    )
    return replace(row, needs=needs, note=note)


def _superior(pairs: Pairs, rows: list[Check], rules: Rules, alpha: float) -> tuple[list[Check], Check]:
    """Return the rows with "better" where Holm's test shows it, and the check "better somewhere".

    The macro AUC and each decided finding form one family of tests.
    """
    idle = "inconclusive" if rules.superiority_required else "ok"
    required = "lower bound > 0 (Holm)" + ("" if rules.superiority_required else ", not required here")
    row = Check("better somewhere", None, None, None, required, idle, note="no finding has enough patients")
    if not pairs:
        return rows, row
    a, b = (stats.macro([pair[i] for pair in pairs.values()]) for i in (0, 1))
    tails = {name: _tail(*pair) for name, pair in {"macro AUC": (a, b), **pairs}.items()}
    claimed = stats.holm(tails, alpha)
    rows = [replace(r, outcome="better") if r.finding in claimed and r.outcome == "non_inferior" else r for r in rows]
    return rows, replace(
        row,
        observed=a.value - b.value,
        ci=stats.interval(a, b, alpha),
        candidate=a.value,
        reference=b.value,
        outcome="better" if claimed else idle,
        note=", ".join(claimed),
    )


def _tail(a: Curve, b: Curve) -> float:
    """Return the one-sided p of "a is no better than b"; 1 for equal models."""
    z = float(stats.statistic(a, b, 0.0))
    return 1.0 if stats.same(a, b) else stats.NORMAL.cdf(-z) if isfinite(z) else float(z < 0)


# ------------------------------------------------------------------------------------- checks 5 and 7: parity, sanity


def _parity(parity: Mapping[str, float] | None, rules: Rules) -> Check:
    required = f"largest |dp| torch/ONNX <= {rules.parity_limit:g}"
    seen = [float(v) for k, v in (parity or {}).items() if k != "images"]
    if not seen:
        return Check("parity", None, None, None, required, "fail", note="not measured")
    if not all(map(isfinite, seen)):
        return Check("parity", None, None, None, required, "fail", note="not finite")
    return Check("parity", None, max(seen), None, required, "ok" if max(seen) <= rules.parity_limit else "fail")


def _sanity(own: Columns, table: LabelTable, rules: Rules) -> list[Check]:
    rows: list[Check] = []
    for finding, p in own.items():
        share = float(np.isfinite(p).mean()) if len(p) else 0.0
        inside = share == 1.0 and bool(((p >= 0) & (p <= 1)).all())
        rows.append(Check("finite", finding, share, None, "all in [0, 1]", "ok" if inside else "fail"))
        if not inside:
            continue
        low, high = np.percentile(p, [1, 99])
        wide = float(high - low)
        limit = f">= {rules.min_spread:g} from the 1st to the 99th percentile"
        fine = wide >= rules.min_spread
        rows.append(
            Check("spread", finding, wide, None, limit, "ok" if fine else "fail", note="" if fine else CONSTANT)
        )
        rows += _prevalence(finding, p, table, rules)
    return rows


def _prevalence(finding: str, p: np.ndarray, table: LabelTable, rules: Rules) -> list[Check]:
    """Check the mean probability against the labelled share of the rarer class, with Wilson's interval for small counts."""
    known, labels = table.known(finding)
    if min(table.counts(finding)) < rules.min_shown:
        return []  # the share of a few patients is too uncertain to compare a mean with
    n, share, mean = len(labels), float(labels.mean()), float(p[known].mean())
    if share > 0.5:
        share, mean = 1 - share, 1 - mean
    z = 3.0  # one false alarm in a thousand
    centre, half = share + z * z / (2 * n), z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    factor = rules.prevalence_factor
    fine = low / factor <= mean <= high * factor
    required = f"mean probability within {factor:g}x of the labelled share {share:.3f}"
    return [Check("prevalence", finding, mean / share, None, required, "ok" if fine else "fail")]


# ---------------------------------------------------------------------------------------- the power of a golden set


@dataclass(frozen=True)
class Power:
    """The power of one evaluation on one finding; `power` is None where too few patients have labels to decide."""

    finding: str
    positives: int
    negatives: int
    auc: float | None
    correlation: float | None
    power: float | None


def golden_power(first: Scores, second: Scores, golden: Golden, rules: Rules, alpha: float) -> list[Power]:
    """Return the power of one evaluation per finding, for a candidate equal to the champion.

    `first` and `second`: scores of two models of the site, in place of candidate and champion. Their correlation, the mean
    of their AUCs and the variance of `second` are used. Identical scores correlate 1: no candidate will reach that power.
    """
    table = LabelTable(golden)
    columns_a, columns_b = table.reference(first, "first"), table.reference(second, "second")
    powers: list[Power] = []
    for finding in table.findings:
        m, n = table.counts(finding)
        if finding not in columns_a or finding not in columns_b or min(m, n) < 2:
            powers.append(Power(finding, m, n, None, None, None))
            continue
        a, b = table.curve(finding, columns_a[finding]), table.curve(finding, columns_b[finding])
        r = stats.correlation(a, b)
        level = (a.level + b.level) / 2
        chance = None if min(m, n) < rules.min_class or isnan(r) else power(level, b.variance, r, rules.margin, alpha)
        powers.append(Power(finding, m, n, level, None if isnan(r) else r, chance))
    return powers
