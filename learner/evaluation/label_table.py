"""The labels of some patients by finding, and what a model's scores amount to on them: curves, counts, paired differences.

The gate, the floor and the report on forgetting compare models with it. Must import numpy and the standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from learner.evaluation import auc as stats
from learner.evaluation.auc import Curve
from learner.evaluation.verdict import Golden, Scores

Columns = dict[str, np.ndarray]  # finding -> float [N]
ALPHA_95 = 0.025  # of each bound of a 95 % interval


class LabelTable:
    """The golden labels by finding; the shapes are checked once."""

    def __init__(self, golden: Golden):
        self.labels = np.asarray(golden.labels, float)
        self.findings = tuple(golden.findings)
        keys, self.patient = np.unique(np.asarray(golden.patients), return_inverse=True)
        self.patients = len(keys)
        shape = len(self.patient), len(self.findings)
        if self.labels.shape != shape:
            raise ValueError(f"golden labels are {self.labels.shape}, images x findings are {shape}")

    def columns(self, scores: Scores, who: str) -> Columns:
        """Return the scores of each golden finding; `who` names the model in the ValueError for a wrong shape."""
        names = tuple(scores.findings) or self.findings
        p = np.asarray(scores.probabilities, float)
        if p.shape != (len(self.patient), len(names)):
            raise ValueError(f"{who}: scores are {p.shape}, images x findings are {(len(self.patient), len(names))}")
        return {name: p[:, i] for i, name in enumerate(names) if name in self.findings}

    def reference(self, scores: Scores, who: str) -> Columns:
        """Return the scores of a model to compare with; ValueError when they are not finite."""
        columns = self.columns(scores, who)
        broken = [name for name, p in columns.items() if not np.isfinite(p).all()]
        if broken:
            raise ValueError(f"{who}: scores of {broken[0]!r} are not finite; nothing can be compared with them")
        return columns

    def known(self, finding: str) -> tuple[np.ndarray, np.ndarray]:
        """Return bool [N], the images with a label, and float [known], those labels."""
        column = self.labels[:, self.findings.index(finding)]
        return ~np.isnan(column), column[~np.isnan(column)]

    def counts(self, finding: str) -> tuple[int, int]:
        """Return the number of patients with the finding on some image, and of patients without it on some image."""
        known, labels = self.known(finding)
        who = self.patient[known]
        return len(np.unique(who[labels > 0.5])), len(np.unique(who[labels <= 0.5]))

    def curve(self, finding: str, p: np.ndarray) -> Curve:
        """Return the Curve of the probabilities `p` [N] against the known labels of a finding."""
        known, labels = self.known(finding)
        return stats.curve(p[known], labels, self.patient[known], self.patients)


@dataclass(frozen=True)
class Paired:
    """Two models on the same patients. `curves` is None below two patients of a class, `ci` is None below `least` patients."""

    positives: int  # patients with the finding, and without
    negatives: int
    curves: tuple[Curve, Curve] | None  # of the model and of its reference
    ci: tuple[float, float] | None  # 95 % interval of the difference in AUC, patients as clusters

    @property
    def fewer(self) -> int:
        """Return the number of patients of the smaller class."""
        return min(self.positives, self.negatives)


def paired(table: LabelTable, finding: str, own: np.ndarray, reference: np.ndarray, least: int) -> Paired:
    """Compare scores float [N] of two models on one finding; an interval needs `least` patients of the smaller class."""
    m, n = table.counts(finding)
    if min(m, n) < 2:
        return Paired(m, n, None, None)
    a, b = table.curve(finding, own), table.curve(finding, reference)
    return Paired(m, n, (a, b), stats.interval(a, b, ALPHA_95) if min(m, n) >= least else None)


def paired_macro(pairs: Sequence[Paired]) -> Paired | None:
    """Return the comparison of the macro AUC over the findings that have an interval, or None where none has one."""
    counted = [pair for pair in pairs if pair.ci and pair.curves]
    if not counted:
        return None
    a, b = (stats.macro([pair.curves[i] for pair in counted if pair.curves]) for i in (0, 1))
    positives, negatives = (min(getattr(pair, side) for pair in counted) for side in ("positives", "negatives"))
    return Paired(positives, negatives, (a, b), stats.interval(a, b, ALPHA_95))


def more_patients(needs: int) -> str:
    """Return what a comparison lacks, as text."""
    return f"needs {needs} more patients of the smaller class"
