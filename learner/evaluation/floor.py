"""A model beside the floor, a logistic regression on raw pixels: one row a finding and one for the macro AUC.

The rows inform and decide nothing. Must import numpy and the standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from learner.evaluation import pixel_baseline
from learner.evaluation.label_table import LabelTable, Paired, more_patients, paired, paired_macro
from learner.evaluation.verdict import MIN_SHOWN, Check, Scores

NAME = "vs raw pixels"
REQUIRED = "no requirement; 95 % interval"
UNFITTED = "no labelled train images of both classes"
TOLD = 5  # findings that a line names; the rows hold all
PART = 64  # plates in memory at once

ReadPlates = Callable[[int, int], np.ndarray]  # first and last place of a part to uint8 [n, H, W]


def thumbnails(count: int, read: ReadPlates) -> np.ndarray:
    """Return the thumbnails float [count, D] of plates, of which `read` gets a part at a time."""
    parts = [pixel_baseline.thumbnails(read(low, min(low + PART, count))) for low in range(0, count, PART)]
    return np.concatenate([np.empty((0, pixel_baseline.SIDE**2)), *parts])


def scores(train: np.ndarray, labels: np.ndarray, test: np.ndarray, findings: tuple[str, ...]) -> Scores:
    """Return the floor's probabilities float [N, F] of thumbnails `test` [N, D], fitted to `train` and `labels` [n, F].

    nan for a finding whose train labels lack one class: raw pixels could not learn it.
    """
    learnable = [bool((column == 1).any() and (column == 0).any()) for column in labels.T]
    if not any(learnable):
        return Scores(np.full((len(test), len(findings)), np.nan), findings)
    probabilities = pixel_baseline.fit(train, labels).scores(test)
    return Scores(np.where(learnable, probabilities, np.nan), findings)


def against_floor(candidate: Scores, floor: Scores, table: LabelTable, least: int = MIN_SHOWN) -> tuple[Check, ...]:
    """Return the rows of a candidate beside the floor: macro AUC first, then each finding of the table.

    The interval of the paired difference needs `least` patients of the smaller class. Outcomes: better or worse where the
    interval lies above or below 0, else inconclusive.
    """
    own, pixels = table.columns(candidate, "candidate"), table.columns(floor, "raw pixels")
    rows: list[Check] = []
    pairs: list[Paired] = []
    for finding in table.findings:
        empty = Check(NAME, finding, None, None, REQUIRED, "inconclusive")
        if finding not in own:
            rows.append(replace(empty, note="the candidate has no score for it"))
        elif not np.isfinite(own[finding]).all():
            rows.append(replace(empty, note="scores are not finite"))
        elif finding not in pixels or not np.isfinite(pixels[finding]).all():
            rows.append(replace(empty, note=UNFITTED))
        else:
            pairs.append(paired(table, finding, own[finding], pixels[finding], least))
            rows.append(_row(finding, pairs[-1], least))
    macro = paired_macro(pairs)
    first = Check(NAME, None, None, None, REQUIRED, "inconclusive", note="no finding has enough patients and labels")
    return (_row(None, macro, least) if macro else first, *rows)


def _row(finding: str | None, pair: Paired, least: int) -> Check:
    row = Check(
        NAME, finding, None, pair.ci, REQUIRED, "inconclusive", positives=pair.positives, negatives=pair.negatives
    )
    if pair.curves:
        a, b = pair.curves
        row = replace(row, observed=a.value - b.value, candidate=a.value, reference=b.value)
    if not pair.ci:
        needs = least - pair.fewer
        return replace(row, needs=needs, note=more_patients(needs))
    low, high = pair.ci
    return replace(row, outcome="better" if low > 0 else "worse" if high < 0 else "inconclusive")


def line(rows: Sequence[Check]) -> str:
    """Return the rows in words: what is worse than raw pixels, and what is not shown better; both may be missing."""
    worse = [str(row) for row in rows if row.outcome == "worse"]
    unclear = [row.finding or "macro AUC" for row in rows if row.outcome == "inconclusive"]
    told = ", ".join(unclear[:TOLD]) + (f" and {len(unclear) - TOLD} more" if len(unclear) > TOLD else "")
    parts = [f"worse than raw pixels: {', '.join(worse)}"] if worse else []
    parts += [f"not shown better than raw pixels: {told}"] if unclear else []
    return "; ".join(parts) or "better than raw pixels"


def alert(rows: Sequence[Check]) -> str | None:
    """Return the rows whose interval lies below 0, as text, or None."""
    worse = [str(row) for row in rows if row.name == NAME and row.outcome == "worse"]
    return "; ".join(worse) or None
