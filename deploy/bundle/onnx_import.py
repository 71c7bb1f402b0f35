"""Import of a foreign ONNX file (`models import FILE.onnx`): check it against the bundle contract, write the four parts.

The card states no performance and no calibration: neither was measured.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from cxrloop.plate import PLATE_SIDE, PLATE_VERSION
from deploy import runtime
from deploy.errors import BundleRefused, NoAnswer

PROBES = 8  # test plates


def import_onnx(onnx_file: Path, parts: Path, findings: list[str] | tuple[str, ...]) -> None:
    """Write model.onnx, card.json, thresholds.json and probe.npz to `parts`, ready for `seal`.

    The parts depend on the file and the findings alone, so importing a file twice gives the same bundle.
    Raises BundleRefused for a graph that breaks the contract, ProviderUnavailable without onnxruntime.
    """
    runtime.require("cpu")
    model = onnx_file.read_bytes()
    plates = synthetic_plates()
    logits = _checked_logits(onnx_file, model, plates, len(findings))
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


def _checked_logits(onnx_file: Path, model: bytes, plates: np.ndarray, findings: int) -> np.ndarray:
    """Return the logits float32 [8, F] of the test plates after checking the graph and its outputs; BundleRefused."""
    try:
        session = runtime.load(model, "cpu")
        runtime.check_graph(session, findings)
        logits, _, heatmap = runtime.run(session, plates)
        alone = np.concatenate([runtime.run(session, plate[None])[0] for plate in plates])
    except (ValueError, NoAnswer) as wrong:
        raise BundleRefused(f"{onnx_file}: {wrong}") from None
    if logits.shape != (PROBES, findings) or heatmap.shape[:2] != logits.shape:
        raise BundleRefused(
            f"{onnx_file}: logits {list(logits.shape)} and heatmap {list(heatmap.shape)} for {PROBES} plates, "
            f"expected [{PROBES}, {findings}] and [{PROBES}, {findings}, g, g]: the site's findings"
        )
    if not np.isfinite(logits).all():
        raise BundleRefused(f"{onnx_file}: logits are not finite on synthetic test plates")
    if not np.allclose(logits, alone, atol=1e-3):
        raise BundleRefused(f"{onnx_file}: logits depend on the other images of the batch; export in inference mode")
    return logits


def synthetic_plates() -> np.ndarray:
    """Return uint8 [8, 512, 512]: flat, ramps, checkers, disc, noise; always the same, without patient data."""
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
