"""The gate: may this candidate replace the champion? A pure function of scores, labels and the site's rules.

Non-inferior to the champion AND to the locked baseline on every finding that must be shown (an intersection-union
test, so alpha is not split), better somewhere where the site asks for it (Holm), sane scores, torch/ONNX parity.
It reads no file, spends no budget and deploys nothing: the agent wrote the look down before calling, and a verdict
only permits. numpy and the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, isfinite, isnan, sqrt

import numpy as np

from learner.evaluation import auc as stats
from learner.evaluation.auc import Curve, alpha_per_look, auc, power
from learner.evaluation.verdict import Check, Golden, Rules, Scores, Verdict, conclude

__all__ = ["Check", "Golden", "Power", "Rules", "Scores", "Verdict", "alpha_per_look", "auc", "golden_power", "judge"]

WANTED_POWER = 0.8  # what "needs N more" aims at
CONSTANT = "the same answer to every image: label train images of both kinds, or leave this finding out"
Columns = dict[str, np.ndarray]  # finding -> float [N]
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
) -> Verdict:
    """The verdict of one look at one-sided level `alpha`.

    `parity`: largest difference in probability between torch and ONNX, by batch size (or "probe"); key "images" is
    a count; None fails, since nobody measured. `measured`: rows found elsewhere (operating point, subgroups, replay),
    which count like the gate's own. ValueError for scores that do not fit the golden set, for a reference whose
    scores are not finite, for a must_show that golden does not know.
    """
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha {alpha}: need a one-sided level between 0 and 0.5")
    table = _Table(golden)
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
    return Verdict(outcome, checks, line, alpha, rules.margin)


class _Table:
    """The golden labels by finding, checked once."""

    def __init__(self, golden: Golden):
        self.labels = np.asarray(golden.labels, float)
        self.findings = tuple(golden.findings)
        keys, self.patient = np.unique(np.asarray(golden.patients), return_inverse=True)
        self.patients = len(keys)
        shape = len(self.patient), len(self.findings)
        if self.labels.shape != shape:
            raise ValueError(f"golden labels are {self.labels.shape}, images x findings are {shape}")

    def columns(self, scores: Scores, who: str) -> Columns:
        names = tuple(scores.findings) or self.findings
        p = np.asarray(scores.probabilities, float)
        if p.shape != (len(self.patient), len(names)):
            raise ValueError(f"{who}: scores are {p.shape}, images x findings are {(len(self.patient), len(names))}")
        return {name: p[:, i] for i, name in enumerate(names) if name in self.findings}

    def reference(self, scores: Scores, who: str) -> Columns:
        columns = self.columns(scores, who)
        broken = [name for name, p in columns.items() if not np.isfinite(p).all()]
        if broken:
            raise ValueError(f"{who}: scores of {broken[0]!r} are not finite; nothing can be compared with them")
        return columns

    def known(self, finding: str) -> tuple[np.ndarray, np.ndarray]:
        """bool [N], images with a label; float [known], those labels."""
        column = self.labels[:, self.findings.index(finding)]
        return ~np.isnan(column), column[~np.isnan(column)]

    def counts(self, finding: str) -> tuple[int, int]:
        """Patients with the finding on some image, and patients without it on some image."""
        known, labels = self.known(finding)
        who = self.patient[known]
        return len(np.unique(who[labels > 0.5])), len(np.unique(who[labels <= 0.5]))

    def curve(self, finding: str, p: np.ndarray) -> Curve:
        known, labels = self.known(finding)
        return stats.curve(p[known], labels, self.patient[known], self.patients)


# ------------------------------------------------------------------------------------------ checks 1 and 2: as good?


def _compare(
    name: str, own: Columns, other: Columns, table: _Table, rules: Rules, alpha: float
) -> tuple[Pairs, list[Check]]:
    """A row for each golden finding, and the curves of those with enough patients to decide on."""
    pairs: Pairs = {}
    rows: list[Check] = []
    for finding in table.findings:
        m, n = table.counts(finding)
        lack = rules.min_class - min(m, n)
        row = Check(
            name, finding, None, None, f"lower bound > {-rules.margin:g}", "not_shown", positives=m, negatives=n
        )
        if finding not in own or finding not in other:
            who = "candidate" if finding not in own else name.removeprefix("vs ")
            rows.append(replace(row, note=f"the {who} does not answer it"))
        elif not np.isfinite(own[finding]).all():
            rows.append(replace(row, note="scores are not finite"))
        elif min(m, n) < 2:
            rows.append(replace(row, needs=lack, note=_more(lack)))
        else:
            a, b = table.curve(finding, own[finding]), table.curve(finding, other[finding])
            row = replace(row, observed=a.value - b.value, candidate=a.value, reference=b.value)
            if lack <= 0:
                pairs[finding] = a, b
                row = _decided(replace(row, ci=stats.interval(a, b, alpha)), a, b, rules, alpha)
            else:
                ci = stats.interval(a, b, alpha) if min(m, n) >= rules.min_shown else None
                row = replace(row, ci=ci, needs=lack, note=_more(lack))
            rows.append(row)
    return pairs, rows


def _decided(row: Check, a: Curve, b: Curve, rules: Rules, alpha: float) -> Check:
    """`row` with its answer; "better" is a claim, and `_superior` makes those."""
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
    note = f"power {chance:.0%} if there is no difference" + (f"; {WANTED_POWER:.0%} {_more(needs)}" if needs else "")
    return replace(row, needs=needs, note=note)


def _more(needs: int) -> str:
    return f"needs {needs} more patients of the smaller class"


def _superior(pairs: Pairs, rows: list[Check], rules: Rules, alpha: float) -> tuple[list[Check], Check]:
    """Claims of "better" than the champion: the macro AUC and each decided finding are one family, held by Holm."""
    idle = "not_shown" if rules.superiority_required else "ok"
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
    """One-sided p of "a is no better than b"; exactly equal models are no evidence."""
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


def _sanity(own: Columns, table: _Table, rules: Rules) -> list[Check]:
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


def _prevalence(finding: str, p: np.ndarray, table: _Table, rules: Rules) -> list[Check]:
    """Mean probability against the labelled share of the rarer answer; small counts get Wilson's benefit of doubt."""
    known, labels = table.known(finding)
    if min(table.counts(finding)) < rules.min_shown:
        return []  # a share of a few patients says nothing about a mean
    n, share, mean = len(labels), float(labels.mean()), float(p[known].mean())
    if share > 0.5:
        share, mean = 1 - share, 1 - mean
    z = 3.0  # a false alarm in a thousand
    centre, half = share + z * z / (2 * n), z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    factor = rules.prevalence_factor
    fine = low / factor <= mean <= high * factor
    required = f"mean probability within {factor:g}x of the labelled share {share:.3f}"
    return [Check("prevalence", finding, mean / share, None, required, "ok" if fine else "fail")]


# ---------------------------------------------------------------------------------------- what a golden set can show


@dataclass(frozen=True)
class Power:
    """What one look at a finding can show; `power` is None where there are too few patients to decide at all."""

    finding: str
    positives: int
    negatives: int
    auc: float | None
    correlation: float | None
    power: float | None


def golden_power(first: Scores, second: Scores, golden: Golden, rules: Rules, alpha: float) -> list[Power]:
    """Power of one look per finding if a candidate equals the champion, at the correlation of two score sets.

    `first` and `second` are two models of the site, the closest it has to candidate and champion; their AUC's mean
    and `second`'s variance are used. Identical score sets correlate 1 and promise power that no candidate will have.
    """
    table = _Table(golden)
    one, two = table.reference(first, "first"), table.reference(second, "second")
    found: list[Power] = []
    for finding in table.findings:
        m, n = table.counts(finding)
        if finding not in one or finding not in two or min(m, n) < 2:
            found.append(Power(finding, m, n, None, None, None))
            continue
        a, b = table.curve(finding, one[finding]), table.curve(finding, two[finding])
        r = stats.correlation(a, b)
        level = (a.level + b.level) / 2
        chance = None if min(m, n) < rules.min_class or isnan(r) else power(level, b.variance, r, rules.margin, alpha)
        found.append(Power(finding, m, n, level, None if isnan(r) else r, chance))
    return found
