"""What a model lost or gained against an earlier one: AUC differences for all patients, by view and by scanner.

The rows inform and decide nothing. Must import numpy and the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from learner.evaluation.label_table import LabelTable, Paired, paired, paired_macro
from learner.evaluation.verdict import MIN_SHOWN, Golden, Scores

TOO_FEW = "not enough data"
UNKNOWN = "not known"  # the view or scanner of an image whose header does not name it


@dataclass(frozen=True)
class Change:
    """One comparison: group "all", "view" or "scanner" with its value; finding None is the macro AUC.

    `before`, `after`: AUC of the earlier model and of the new one; `ci`: 95 % interval of the difference, patients as
    clusters. All of them are None where a class has too few patients; `note` says so.
    """

    group: str
    value: str
    finding: str | None
    images: int
    before: float | None = None
    after: float | None = None
    difference: float | None = None
    ci: tuple[float, float] | None = None
    note: str = ""

    def __str__(self) -> str:
        what = f"{self.finding or 'macro'} AUC" + (f", {self.group} {self.value}" if self.value else "")
        if self.ci is None:
            return f"{what}: {self.note}"
        return f"{what}: {self.difference:+.3f} [{self.ci[0]:+.3f}, {self.ci[1]:+.3f}]"


def changes(
    after: Scores,
    before: Scores,
    validation: Golden,
    groups: Mapping[str, Sequence[str | None]],
    least: int = MIN_SHOWN,
) -> list[Change]:
    """Return the changes from `before` to `after` on labelled patients: all, then each value of each group.

    `groups`: by name ("view", "scanner"), a value for each image, None = unknown. All patients have a row for the macro
    AUC and each finding. A value has a row for its macro AUC and for the findings with `least` patients of each class.
    """
    every = np.ones(len(validation.patients), bool)
    rows = _changes("all", "", every, after, before, validation, least)
    for group, values in groups.items():
        named = np.array([value or UNKNOWN for value in values], object)
        for value in sorted(set(named)):
            part = _changes(group, value, named == value, after, before, validation, least)
            rows += [row for row in part if row.finding is None or row.ci]
    return rows


def _changes(
    group: str, value: str, chosen: np.ndarray, after: Scores, before: Scores, validation: Golden, least: int
) -> list[Change]:
    """Return the row of the macro AUC and one of each finding, on the chosen images bool [N]."""
    patients = [patient for patient, inside in zip(validation.patients, chosen, strict=True) if inside]
    table = LabelTable(Golden(np.asarray(validation.labels)[chosen], patients, validation.findings))
    new, old = (
        table.columns(Scores(scores.probabilities[chosen], scores.findings), who)
        for scores, who in ((after, "this model"), (before, "the earlier model"))
    )
    pairs = {
        finding: paired(table, finding, new[finding], old[finding], least)
        for finding in table.findings
        if finding in new and finding in old
    }
    images = int(chosen.sum())
    rows = [_change(group, value, finding, images, pairs.get(finding)) for finding in table.findings]
    return [_change(group, value, None, images, paired_macro([*pairs.values()])), *rows]


def _change(group: str, value: str, finding: str | None, images: int, pair: Paired | None) -> Change:
    if pair is None or pair.ci is None or pair.curves is None:
        return Change(group, value, finding, images, note=TOO_FEW)
    new, old = (curve.value for curve in pair.curves)
    return Change(group, value, finding, images, old, new, new - old, pair.ci)


def line(rows: Sequence[Change]) -> str:
    """Return the rows in words: the losses that are shown; else the change of the macro AUC, or that data lack."""
    lost = [str(row) for row in rows if row.ci and row.ci[1] < 0]
    if lost:
        return f"lost on {'; '.join(lost)}"
    macro = next((row for row in rows if row.group == "all" and row.finding is None), None)
    return f"no loss shown; {macro}" if macro and macro.ci else TOO_FEW
