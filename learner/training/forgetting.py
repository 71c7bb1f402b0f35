"""A card's entry `forgetting`: the round's model beside the one that it started from, on labelled validation images."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from learner.data.plates import label_table, read_plates
from learner.evaluation import forgetting
from learner.evaluation.verdict import Golden, Scores
from learner.round.manifest import RoundManifest

BATCH = 16  # images in one run of the earlier model


def forgotten(
    target: Path,
    manifest: RoundManifest,
    logits: np.ndarray,
    open_session: Callable[[Path], onnxruntime.InferenceSession],
) -> dict[str, Any] | None:
    """Return `{"before", "line", "changes"}` for logits float [N, F] of the model in `target`; None for a first model.

    `logits`: of the N validation images, in their order. The earlier model is the parent's ONNX file, in a first round that of T=0. Images are read and none is kept.
    """
    model = earlier_model(target, manifest)
    if model is None:
        return None
    name, validation = manifest.parent or "t0", manifest.of("validation")
    if not model.exists():
        return {
            "before": name,
            "line": f"not measured: {model.parent.name}/{model.name} is no longer there",
            "changes": [],
        }
    if not validation:
        return {"before": name, "line": forgetting.TOO_FEW, "changes": []}
    session = open_session(model)
    parts = [
        session.run(["logits"], {"plates": read_plates(validation[low : low + BATCH]).numpy()})[0]
        for low in range(0, len(validation), BATCH)
    ]
    before = np.concatenate([np.asarray(part, float) for part in parts])
    labels = label_table(validation).numpy().astype(float)
    rows = forgetting.changes(
        Scores(logits.astype(float), manifest.findings),
        Scores(before, manifest.findings),
        Golden(labels, [sample.patient for sample in validation], manifest.findings),
        {"view": [sample.view for sample in validation], "scanner": [sample.scanner for sample in validation]},
    )
    return {"before": name, "line": forgetting.line(rows), "changes": [asdict(row) for row in rows]}


def earlier_model(target: Path, manifest: RoundManifest) -> Path | None:
    """Return the ONNX file of the model that the model in `target` started from; None for the first model of all."""
    if manifest.parent_state:
        return manifest.parent_state.with_name("model.onnx")
    first = manifest.folder / "t0" / "model.onnx"
    return first if target.name != "t0" and first.exists() else None
