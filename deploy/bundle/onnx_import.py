"""Adopt a foreign ONNX file (`models import FILE.onnx`): check it against the bundle contract and write its parts.

Refuses to know how the model was made; claims no calibration and no performance for it.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from deploy.bundle.contract import PLATE_SIDE, PLATE_VERSION
from deploy.server import runtime

PROBES = 8


class OnnxRefused(Exception):
    """A model file that doesn't keep the bundle contract; says which part, got and expected."""


def import_onnx(onnx_file: Path, parts: Path, findings: list[str] | tuple[str, ...]) -> None:
    """Write model.onnx, card.json, thresholds.json and probe.npz to `parts`, ready for `seal`.

    The parts depend on the file and the findings alone, so importing a file twice gives the same bundle.
    OnnxRefused for a graph off the contract, NoRuntime without onnxruntime.
    """
    runtime.require("cpu")
    model = onnx_file.read_bytes()
    plates = synthetic_plates()
    try:
        session = runtime.load(model, "cpu")
        runtime.check_graph(session, len(findings))
        logits, _, heatmap = runtime.run(session, plates)
        alone = np.concatenate([runtime.run(session, plate[None])[0] for plate in plates])
    except (ValueError, runtime.NoAnswer) as wrong:
        raise OnnxRefused(f"{onnx_file}: {wrong}") from None
    if logits.shape != (PROBES, len(findings)) or heatmap.shape[:2] != logits.shape:
        raise OnnxRefused(
            f"{onnx_file}: logits {list(logits.shape)} and heatmap {list(heatmap.shape)} for {PROBES} plates, "
            f"expected [{PROBES}, {len(findings)}] and [{PROBES}, {len(findings)}, g, g]: the site's findings"
        )
    if not np.isfinite(logits).all():
        raise OnnxRefused(f"{onnx_file}: logits are not finite on plain test plates")
    if not np.allclose(logits, alone, atol=1e-3):
        raise OnnxRefused(f"{onnx_file}: an image's logits change with the images beside it; export in inference mode")
    digest = hashlib.sha256(model).hexdigest()
    card = {
        "findings": list(findings),
        "recipe": None,
        "parent": None,
        "plate_version": PLATE_VERSION,
        "round": None,
        "made_at": None,
        "metrics": {},
        "parity": None,
        "train_images": None,
        "labelled": None,
        "poison": False,
        "imported": {"sha256": digest},
    }
    thresholds = {
        f: {"threshold": 0.5, "rule": "imported: no calibration", "sensitivity": None, "specificity": None, "n": 0}
        for f in findings
    }
    parts.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(onnx_file, parts / "model.onnx")
    (parts / "card.json").write_text(json.dumps(card, indent=1))
    (parts / "thresholds.json").write_text(json.dumps(thresholds, indent=1))
    np.savez_compressed(parts / "probe.npz", plates=plates, logits=logits)


def synthetic_plates() -> np.ndarray:
    """uint8 [8, 512, 512]: flat, ramps, checkers, disc, noise; the same at every call, and no patient's."""
    y, x = np.mgrid[0:PLATE_SIDE, 0:PLATE_SIDE]
    noise = np.random.default_rng(512)
    coarse = noise.integers(0, 256, (16, 16), dtype=np.uint8)
    plates = [
        np.full_like(x, 128),
        x // 2,
        y // 2,
        (x // 32 + y // 32) % 2 * 255,
        (x // 8 + y // 8) % 2 * 255,
        255 * ((x - 256) ** 2 + (y - 256) ** 2 < 180**2),
        noise.integers(0, 256, x.shape),
        np.kron(coarse, np.ones((32, 32), np.uint8)),
    ]
    return np.stack(plates).astype(np.uint8)
