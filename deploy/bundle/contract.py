"""The bundle contract for the four parts a round hands over: model.onnx, card.json, thresholds.json, probe.npz.

The graph inside model.onnx is checked in deploy.runtime. Must not import onnxruntime.
"""

import json
import zipfile
from pathlib import Path

import numpy as np

from cxrloop.npy import HEADER_LOCK
from cxrloop.plate import PLATE_SHAPE, PLATE_VERSION
from deploy.errors import BundleRefused

PARTS = ("model.onnx", "card.json", "thresholds.json", "probe.npz")


def check_parts(folder: Path) -> tuple[dict, dict]:
    """Return (card, thresholds) of a folder after checking all four parts; BundleRefused names the wrong part."""
    for name in PARTS:
        if not (folder / name).is_file():
            raise BundleRefused(f"{name} is missing; expected {', '.join(PARTS)}")
    card = _json_object(folder / "card.json")
    findings = card.get("findings")
    if not isinstance(findings, list) or not findings or not all(isinstance(f, str) and f for f in findings):
        raise BundleRefused("card.json: findings must be a non-empty list of names")
    if len(set(findings)) != len(findings):
        raise BundleRefused("card.json: findings holds a name twice")
    if card.get("plate_version") != PLATE_VERSION:
        raise BundleRefused(
            f"card.json: plate_version {card.get('plate_version')!r}, expected {PLATE_VERSION}; "
            "train a round with this version, or run the version that made the bundle"
        )
    thresholds = _json_object(folder / "thresholds.json")
    for finding in findings:
        entry = thresholds.get(finding)
        value = entry.get("threshold") if isinstance(entry, dict) else None
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise BundleRefused(f"thresholds.json: {finding} needs a threshold in [0, 1], got {value!r}")
    read_probe(folder / "probe.npz", len(findings))
    return card, thresholds


def read_probe(path: Path, findings: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (plates uint8 [P, 512, 512], logits float32 [P, F]): test plates and the logits sealed with them.

    Raises BundleRefused for another form.
    """
    try:
        with HEADER_LOCK, np.load(path, allow_pickle=False) as probe:
            plates, logits = probe["plates"], probe["logits"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as wrong:
        raise BundleRefused(f"probe.npz: unreadable ({wrong}); expected arrays plates and logits") from None
    if plates.dtype != np.uint8 or plates.ndim != 3 or plates.shape[1:] != PLATE_SHAPE or not len(plates):
        raise BundleRefused(f"probe.npz: plates is {plates.dtype} {list(plates.shape)}, expected uint8 [P, 512, 512]")
    if logits.shape != (len(plates), findings) or not np.isfinite(logits).all():
        raise BundleRefused(f"probe.npz: logits is {list(logits.shape)}, expected finite [{len(plates)}, {findings}]")
    return plates, logits.astype(np.float32)


def _json_object(path: Path) -> dict:
    try:
        document = json.loads(path.read_bytes())
    except ValueError as wrong:
        raise BundleRefused(f"{path.name}: not JSON ({wrong})") from None
    if not isinstance(document, dict):
        raise BundleRefused(f"{path.name}: expected a JSON object")
    return document
