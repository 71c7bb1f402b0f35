"""A process may die at any durable step of the straight line; starting again makes everything right."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from deploy.bundle.bundle import open_bundle
from deploy.server.session import Session
from tests.conftest import make_site
from tests.support.agent.crash_line import write_labels
from tests.support.agent.images import put, take_in, xray
from tests.support.deploy.model_server import FINDINGS, ROOT, make_parts, write_model


@pytest.fixture
def tmp_path():
    """In memory where there is some: the line is walked some eighty times, each with dozens of fsyncs."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def base(tmp_path):
    """A site with 40 images, two models on disk, and labels that the second model gets right and the first does not."""
    site = make_site(
        tmp_path / "base",
        site={"findings": list(FINDINGS)},
        patients={"golden": 0.9, "golden_next": 0.0, "calibration": 0.0, "validation": 0.0},
        gate={"min_class": 5, "evaluations_per_year": 1, "alpha": 0.2, "margin": 0.05},
    )
    with site.ledger() as ledger:
        for seed in range(40):
            put(site, xray(seed), f"{seed}.dcm")
        take_in(site, ledger)
        rows = ledger.rows("SELECT sop_uid, plate FROM image WHERE range = 'golden'")
    write_model(site.root / "first.onnx", 1)
    parts = make_parts(tmp_path / "second", 2)
    (tmp_path / "second.onnx").rename(site.root / "second.onnx")
    from deploy.bundle.bundle import seal

    bundle = open_bundle(tmp_path / "m", seal(parts, tmp_path / "m", site.key("signing.key")), site.key("signing.pub"))
    logits = Session(bundle, "cpu", 1).predict(np.stack([site.store.plate(row["plate"]) for row in rows])).logits
    truth = logits > np.median(logits, axis=0)
    found = [(row["sop_uid"], name, int(truth[n, f])) for n, row in enumerate(rows) for f, name in enumerate(FINDINGS)]
    write_labels(site.root / "labels.csv", found)
    return site.root


@pytest.mark.timeout(900)  # some 150 deaths and recoveries, a second each on a free core
def test_a_death_at_any_durable_step_loses_nothing_and_leaves_one_model_in_service(base, tmp_path):
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-m", "tests.support.agent.crash_line", str(base), str(tmp_path / "work")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert said["failures"] == {}, done.stderr[-3000:]
    assert said["steps"] > 40  # the line really was walked to its end, step by step
