"""Every recipe on a fake device whose tensors cannot be mixed with CPU tensors (tests/support/learner/fake_device.py)."""

import os
import subprocess
import sys
from pathlib import Path

from learner.__main__ import main
from tests.support.learner.recipe_rounds import CLASS_LOSS_ONLY, CONVNET
from tests.support.learner.round_folders import make_round
from tests.support.learner.weights import difference

CASES = {
    "distl": {},
    "evolve": {"method": "evolve"},
    "evolve, every option": {
        "method": "evolve", "lam": 0.5, "ibot": 0.5, "koleo": 0.1, "replay": 0.25, "agree": "soft", "average": "all",
        "balance": "effective", "centring": "sinkhorn", "label_weight": 1.0,
    },
    "evolve, the graph's answers": {"method": "evolve", "targets": "graph", "agree": "heads"},
    "evolve, lower blocks frozen": {"method": "evolve", "frozen_blocks": 1, "cached_views": 2},
    "pseudo-label": {"method": "pseudo-label", **CLASS_LOSS_ONLY, "arch": CONVNET},
    "kd": {"method": "kd", **CLASS_LOSS_ONLY, "kd_teacher": CONVNET},
    "pretrain": {"method": "pretrain", "targets": "none"},
}  # fmt: skip


def test_every_recipe_trains_on_a_fake_device_and_distl_as_on_the_cpu(tmp_path):
    """Attention is another kernel there: only distl is compared, as rounding can change the neighbours of the others."""
    apart = [make_round(tmp_path / str(n), **recipe) for n, recipe in enumerate(CASES.values())]
    words = [sys.executable, "-m", "tests.support.learner.fake_device", *map(str, apart)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=Path(__file__).resolve().parents[3], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    host = make_round(tmp_path / "host", **next(iter(CASES.values())))
    assert main([str(host)]) == 0
    assert difference(host, apart[0]) <= 1e-3
