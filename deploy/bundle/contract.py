"""What a round hands over before sealing: model.onnx, card.json, thresholds.json, probe.npz, each with its right form.

Refuses to know signatures and onnxruntime.
"""

import json
import threading
import zipfile
from pathlib import Path

import numpy as np

PLATE_VERSION = (
    1  # the pixel path this code serves; equals dicom.pixels.plate.PLATE_VERSION (a test holds them together)
)
PLATE_SIDE = 512
PARTS = ("model.onnx", "card.json", "thresholds.json", "probe.npz")
HEADER = threading.Lock()  # numpy reads .npy headers with `ast`, which threads break up to CPython 3.12 (gh-106905)


class PartsRefused(Exception):
    """A missing or malformed part; says which and what was expected."""


def check_parts(folder: Path) -> tuple[dict, dict]:
    """(card, thresholds) of a folder that holds all four parts, each well formed; else PartsRefused."""
    for name in PARTS:
        if not (folder / name).is_file():
            raise PartsRefused(f"{name} is missing; expected {', '.join(PARTS)}")
    card = _json_object(folder / "card.json")
    findings = card.get("findings")
    if not isinstance(findings, list) or not findings or not all(isinstance(f, str) and f for f in findings):
        raise PartsRefused("card.json: findings must be a non-empty list of names")
    if len(set(findings)) != len(findings):
        raise PartsRefused("card.json: a finding is named twice")
    if card.get("plate_version") != PLATE_VERSION:
        raise PartsRefused(
            f"card.json: plate_version {card.get('plate_version')!r}, expected {PLATE_VERSION}; "
            "train a round with this version, or run the version that made the bundle"
        )
    thresholds = _json_object(folder / "thresholds.json")
    for finding in findings:
        entry = thresholds.get(finding)
        value = entry.get("threshold") if isinstance(entry, dict) else None
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise PartsRefused(f"thresholds.json: {finding} needs a threshold in [0, 1], got {value!r}")
    read_probe(folder / "probe.npz", len(findings))
    return card, thresholds


def read_probe(path: Path, findings: int) -> tuple[np.ndarray, np.ndarray]:
    """(plates uint8 [P, 512, 512], logits float32 [P, F]) the model must still answer; else PartsRefused."""
    try:
        with HEADER, np.load(path, allow_pickle=False) as probe:
            plates, logits = probe["plates"], probe["logits"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as wrong:
        raise PartsRefused(f"probe.npz: unreadable ({wrong}); expected arrays plates and logits") from None
    sides = (PLATE_SIDE, PLATE_SIDE)
    if plates.dtype != np.uint8 or plates.ndim != 3 or plates.shape[1:] != sides or not len(plates):
        raise PartsRefused(f"probe.npz: plates is {plates.dtype} {list(plates.shape)}, expected uint8 [P, 512, 512]")
    if logits.shape != (len(plates), findings) or not np.isfinite(logits).all():
        raise PartsRefused(f"probe.npz: logits is {list(logits.shape)}, expected finite [{len(plates)}, {findings}]")
    return plates, logits.astype(np.float32)


def _json_object(path: Path) -> dict:
    try:
        document = json.loads(path.read_bytes())
    except ValueError as wrong:
        raise PartsRefused(f"{path.name}: not JSON ({wrong})") from None
    if not isinstance(document, dict):
        raise PartsRefused(f"{path.name}: expected a JSON object")
    return document
