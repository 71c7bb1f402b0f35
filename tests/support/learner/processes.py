"""The learner as a process of its own, for tests that kill, signal or restart it."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def start(folder):
    """Start the learner on a round folder."""
    return subprocess.Popen([sys.executable, "-m", "learner", str(folder)], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for(path, process, seconds=90):
    """Wait until a file exists; fails when the process ends first."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.02)
