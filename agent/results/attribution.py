"""Maps that the served graph can't draw: the learner draws them from the round's weights, in a process of its own.

Needs the training install and a bundle that was learnt here; checks that the weights it explains are those that serve.
Torch is never loaded in this process.
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
LIMIT_S = 1800  # 500 passes forth and back of a base-size transformer on two cores
SAME = 0.01  # in probability; torch and the served graph agree to 0.001 where the weights are the same


def maps(
    site: Site, ledger: Ledger, bundle: Bundle, plate: Path, finding: str, method: str, positive: bool, served: float
) -> tuple[np.ndarray, dict[str, Any]]:
    """float32 [n, h, w] in [0, 1] (n = heads for attention, else 1), and what was measured: `{"completeness"}`.

    `served` is the probability that the bundle itself gives. Raises Problem with the learner's own words.
    """
    state = _state(site, ledger, bundle, method)
    with tempfile.TemporaryDirectory(dir=site.root / "run") as scratch:
        out = Path(scratch) / "maps.npy"
        words = [str(state), str(plate), "--finding", finding, "--method", method, "--out", str(out)]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "learner.explain.saliency", *words, *(["--positive"] if positive else [])],
                capture_output=True, text=True, timeout=LIMIT_S, env={**QUIET, **os.environ},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Problem(f"--method {method}: not done in {LIMIT_S // 60} minutes; ask for gradient") from None
        if done.returncode:
            why = done.stderr.strip().splitlines() or [f"the learner ended with exit code {done.returncode}"]
            raise Problem(f"--method {method}: {why[-1]}")
        said, made = json.loads(done.stdout), np.load(out, allow_pickle=False)
    mine = 1 / (1 + exp(-said["logit"] / bundle.card["temperatures"][bundle.findings.index(finding)]))
    if abs(mine - served) > SAME:
        raise Problem(
            f"bundle {bundle.id} answers {served:.3f} and {state} {mine:.3f}: not the same weights; "
            "restore the round's folder from the backup, or use --method heatmap"
        )
    return made, {"completeness": said["completeness"]}


def _state(site: Site, ledger: Ledger, bundle: Bundle, method: str) -> Path:
    """The weights that a bundle was made from."""
    if find_spec("torch") is None:
        raise Problem(f"--method {method} needs torch: pip install 'cxrloop[train]', or use --method heatmap")
    row = ledger.row("SELECT training_state FROM bundle WHERE id = ?", bundle.id)
    if not row or not row["training_state"]:
        raise Problem(
            f"--method {method}: bundle {bundle.id} was imported and has no training state; use --method heatmap"
        )
    state = site.root / row["training_state"]
    if not state.is_file():
        raise Problem(f"--method {method}: {state} is missing; restore it from the backup, or use --method heatmap")
    return state
