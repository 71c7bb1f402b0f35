"""Eight associations beside faulty senders: runs the soak bench for a few seconds."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[3] / "bench" / "node" / "soak.py"


def test_eight_associations_beside_faulty_senders_lose_nothing_and_leave_nothing(tmp_path):
    out = tmp_path / "out.json"
    run = subprocess.run(
        [sys.executable, BENCH, "--minutes", "0.1", "--associations", "8", "--store", tmp_path, "--out", out],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(out.read_text())
    assert result["acknowledged"] > 8
    assert result["troubles"] > 0
    assert (result["lost"], result["twice"], result["refused"], result["half_written_left"]) == (0, 0, 0, 0)
