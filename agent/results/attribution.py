"""Saliency maps that the served graph can't compute: the learner computes them from the round's weights.

Needs the training install and a bundle that was trained on this site. The learner runs in a process of its own, so that
this process never loads torch.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from math import exp
from pathlib import Path
from typing import Any

import numpy as np

from agent.errors import Problem
from agent.ledger.database import Ledger
from agent.rounds.training import QUIET
from agent.site.site import Site
from deploy.bundle.bundle import Bundle

METHODS = (
    "gradient", "guided", "ig", "ig-blurred", "smoothgrad", "smoothgrad-ig", "attention", "rollout",
)  # fmt: skip
LIMIT_S = 1800  # 500 forward and backward passes of a base-size transformer on two cores
TOLERANCE = 0.01  # of the probability; torch and the served graph agree to 0.001 when their weights are the same


def maps(
    site: Site, ledger: Ledger, bundle: Bundle, plate: Path, finding: str, method: str, positive: bool, served: float
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return maps float32 [n, h, w] in [0, 1] (n = heads for attention, else 1), and `{"completeness"}`.

    `served` is the bundle's probability for this plate: weights that give another one are not explained. Raises Problem
    with the learner's message.
    """
    state = _training_state(site, ledger, bundle, method)
    with tempfile.TemporaryDirectory(dir=site.root / "run") as scratch:
        out = Path(scratch) / "maps.npy"
        options = [str(state), str(plate), "--finding", finding, "--method", method, "--out", str(out)]
        if positive:
            options.append("--positive")
        try:
            done = subprocess.run(
                [sys.executable, "-m", "learner.explain.saliency", *options],
                capture_output=True, text=True, timeout=LIMIT_S, env={**QUIET, **os.environ},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Problem(f"--method {method}: not done in {LIMIT_S // 60} minutes; use --method gradient") from None
        if done.returncode:
            why = done.stderr.strip().splitlines() or [f"the learner ended with exit code {done.returncode}"]
            raise Problem(f"--method {method}: {why[-1]}")
        measured, maps_of_image = json.loads(done.stdout), np.load(out, allow_pickle=False)
    temperature = bundle.card["temperatures"][bundle.findings.index(finding)]
    computed = 1 / (1 + exp(-measured["logit"] / temperature))
    if abs(computed - served) > TOLERANCE:
        raise Problem(
            f"bundle {bundle.id} gives {served:.3f}, {state} gives {computed:.3f}: not the same weights; "
            "restore the round's folder from the backup, or use --method heatmap"
        )
    return maps_of_image, {"completeness": measured["completeness"]}


def _training_state(site: Site, ledger: Ledger, bundle: Bundle, method: str) -> Path:
    """Return the file of the weights that a bundle was exported from; raises Problem."""
    if find_spec("torch") is None:
        raise Problem(f"--method {method} needs torch: pip install 'cxrloop[train]', or use --method heatmap")
    row = ledger.row("SELECT training_state FROM bundle WHERE id = ?", bundle.id)
    if not row or not row["training_state"]:
        raise Problem(
            f"--method {method}: bundle {bundle.id} has no training state (imported, or removed by retention.rounds); "
            "use --method heatmap"
        )
    state = site.root / row["training_state"]
    if not state.is_file():
        raise Problem(f"--method {method}: {state} is missing; restore it from the backup, or use --method heatmap")
    return state
