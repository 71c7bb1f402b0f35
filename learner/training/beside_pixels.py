"""A card's entry `floor`: the network beside raw pixels on the labelled validation patients."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from learner.data.plates import label_table, read_plate
from learner.evaluation import floor
from learner.evaluation.label_table import LabelTable
from learner.evaluation.verdict import Golden, Scores
from learner.round.manifest import RoundManifest, Sample


def beside_pixels(manifest: RoundManifest, logits: np.ndarray) -> dict[str, Any] | None:
    """Return `{"line", "checks"}` for logits float [N, F] of the N validation images, or None without such images.

    Raw pixels learn from the labelled train images. The rows are those of a verdict (`learner/evaluation/floor.py`).
    """
    validation, labelled = manifest.of("validation"), manifest.labelled
    if not validation:
        return None
    labels = label_table(validation).numpy().astype(float)
    table = LabelTable(Golden(labels, [sample.patient for sample in validation], manifest.findings))
    train_labels = label_table(labelled).numpy().astype(float).reshape(len(labelled), len(manifest.findings))
    pixels = floor.scores(_thumbnails(labelled), train_labels, _thumbnails(validation), manifest.findings)
    rows = floor.against_floor(Scores(logits.astype(float), manifest.findings), pixels, table)
    return {"line": floor.line(rows), "checks": [asdict(row) for row in rows]}


def _thumbnails(samples: Sequence[Sample]) -> np.ndarray:
    def read(low: int, high: int) -> np.ndarray:
        return np.stack([read_plate(sample.plate) for sample in samples[low:high]])

    return floor.thumbnails(len(samples), read)
