"""A round on a real small file system that gets full: it pauses, keeps its checkpoint and resumes."""

import subprocess
import sys

import pytest

from learner.engine.checkpoint import read_file
from tests.support.learner.processes import ROOT, wait_for
from tests.support.learner.round_folders import make_round, read_manifest, result, write_manifest
from tests.support.small_disk import small_disk

pytestmark = pytest.mark.peer("mount")

DISK_MB = 64  # a checkpoint takes 8, and 8 more while it is replaced


def learner(disk, folder):
    command = disk.inside(sys.executable, "-m", "learner", str(disk.place / folder))
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_a_full_disk_pauses_the_round_and_keeps_its_checkpoint(tmp_path):
    with small_disk(tmp_path / "disk", DISK_MB) as disk:
        folder = make_round(disk.seen / "r", t0_epochs=100_000, checkpoint_seconds=0)
        process = learner(disk, "r")
        wait_for(folder / "checkpoint/state.safetensors", process)
        ballast = disk.fill()
        while process.poll() is None:  # take every byte that the round frees
            ballast = disk.fill()
        assert process.returncode == 75, process.communicate()[1]
        assert "disk full" in result(folder)["reason"]
        assert not list(folder.rglob(".*.tmp"))
        step = read_file(folder / "checkpoint/state.safetensors")[1]["cursor"]["step"]
        ballast.unlink()
        write_manifest(folder, read_manifest(folder) | {"until": "2020-01-01T05:00:00+00:00"})
        process = learner(disk, "r")
        process.communicate(timeout=120)
        assert (process.returncode, result(folder)["state"]) == (75, "paused")
        assert "window" in result(folder)["reason"]
        assert read_file(folder / "checkpoint/state.safetensors")[1]["cursor"]["step"] >= step > 0
