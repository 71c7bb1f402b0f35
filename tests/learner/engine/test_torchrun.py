"""A round under a real torchrun: what one process learns, also when a worker is killed, asked to pause, or left behind."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.engine.checkpoint import read_file
from learner.errors import RoundBusy
from learner.round.folder import lock_round
from tests.support.learner.recipe_rounds import phases_of
from tests.support.learner.round_folders import make_round, read_manifest, result, write_manifest
from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parents[3]
TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", "--max-restarts", "3"]
# Stochastic depth draws for the images of a rank, so its masks are others; everything else is to be the same.
KEYS = {"drop_path": 0.0, "checkpoint_seconds": 0}


def learner(folder, launcher):
    log = (folder / "log").open("w")
    words = [*launcher, "-m", "learner", str(folder)]
    return subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, env=surroundings(folder))


def surroundings(folder):
    """One thread a process, and what torchrun writes beside the round: by default it stays in /tmp."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PET_LOG_DIR": str(folder / "torchrun")}


def finished(process, folder, code=0, seconds=120):
    assert process.wait(seconds) == code, (folder / "log").read_text()[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A first round with corrections, T=0 included, learnt by one process: an odd batch, and a late one of one image."""
    folder = make_round(tmp_path_factory.mktemp("alone") / "r", train=(5, 8), **KEYS)
    return finished(learner(folder, [sys.executable]), folder)


@pytest.fixture
def copy(alone, tmp_path):
    """The same round, not begun; plates and all at the same times, as on a shared disk."""
    folder = tmp_path / "r"
    folder.mkdir()
    shutil.copytree(alone / "plates", folder / "plates", copy_function=shutil.copy2)
    shutil.copy2(alone / "manifest.json", folder)
    return folder


def difference(one, other, file="final/state.safetensors"):
    """Largest difference of any trained number, relative where it is above 1 (kept logits); but for the biases of keys.

    A bias that all keys share moves every score of a query alike, so softmax drops it, and no answer depends on it: its
    gradient is rounding noise, and Adam makes steps of noise.
    """
    mine, theirs = (read_file(folder / file)[0] for folder in (one, other))
    assert mine.keys() == theirs.keys()
    worst = 0.0
    for name, value in mine.items():
        assert torch.equal(value.isnan(), theirs[name].isnan()), name
        gap = ((value - theirs[name]).abs() / value.abs().clamp(min=1)).nan_to_num(0.0)
        if name.endswith("qkv.bias"):
            query, _, key_value = gap.chunk(3)
            gap = torch.cat([query, key_value])
        worst = max(worst, gap.max().item())
    return worst


def answers(folder):
    with np.load(folder / "final/probe.npz") as probe:
        return probe["logits"]


def workers(process):
    """Process ids of torchrun's workers, by rank."""
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parent = int(path.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
                facts = dict(w.split("=", 1) for w in path.joinpath("environ").read_text().split("\0") if "=" in w)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if parent == process.pid and "RANK" in facts:
                found[int(facts["RANK"])] = int(path.name)
    return found


def wait_until(true, process, folder, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-3000:]
        time.sleep(0.02)


def steps(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


EXACT = {**KEYS, "epochs": 1, "t0_epochs": 1}
SIGNALS = {
    **EXACT, "method": "evolve", "class_hidden": 0, "neighbours": 3, "components": 4, "ibot": 0.5, "koleo": 0.1,
    "replay": 0.25,
}  # fmt: skip
PLAIN = {**EXACT, "prototypes": 0, "local_views": 0, "balance": "effective"}
RECIPES = {
    "evolve, graph": {**SIGNALS, "targets": "graph", "average": "all"},
    "evolve, teacher": {**SIGNALS, "targets": "teacher", "align": True, "agree": "soft", "centring": "sinkhorn"},
    "evolve, answers alone": {
        **EXACT,
        "method": "evolve",
        "class_hidden": 0,
        "prototypes": 0,
        "local_views": 0,
        "lam": 0.0,
    },
    "pseudo-label": {**PLAIN, "method": "pseudo-label", "finetune_epochs": 1},
    "kd": {**PLAIN, "method": "kd", "kd_teacher": "vit_tiny_patch8_depth2"},
}


def test_two_processes_learn_what_one_learns_by_the_other_recipes(tmp_path):
    """Transformers without stochastic depth: every sum of these recipes is over the whole batch. Nothing is exported.

    Adam's eps is larger than a rounding (see `Bare`): at 1e-8 one weight in 35 000 differs by up to 2e-5.
    """
    folders = {}
    for side in ("one", "two"):
        folders[side] = [
            make_round(tmp_path / side / name.replace(", ", "-"), train=(5, 8), **recipe)
            for name, recipe in RECIPES.items()
        ]
    words = [*TORCHRUN, "-m", "tests.support.learner.recipe_rounds", *map(str, folders["two"])]
    together = subprocess.Popen(words, cwd=ROOT, env=surroundings(folders["two"][0]))
    for folder in folders["one"]:
        phases_of(folder)
    assert together.wait(300) == 0
    for one, two in zip(*folders.values(), strict=True):
        phases = {file.name for file in (one / "checkpoint").iterdir()}
        assert phases == {file.name for file in (two / "checkpoint").iterdir()}
        for name in phases - {"state.safetensors"}:
            assert difference(one, two, f"checkpoint/{name}") <= 1e-6, f"{one.name}: {name}"
        told = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, two)]
        for mine, theirs in zip(*told, strict=True):
            numbers = [key for key, value in mine.items() if isinstance(value, float) and key != "seconds"]
            assert mine.keys() == theirs.keys()
            assert [mine[key] for key in numbers] == pytest.approx(
                [theirs[key] for key in numbers], rel=1e-4, abs=1e-6
            ), one.name
        assert steps(two) == steps(one)


def test_two_processes_learn_what_one_learns(alone, copy):
    finished(learner(copy, TORCHRUN), copy)
    assert difference(alone, copy) <= 1e-6
    np.testing.assert_allclose(answers(copy), answers(alone), atol=1e-6)
    said = result(copy)
    assert (said["state"], said["reason"], said["labelled"], said["unlabelled"]) == ("trained", None, 5, 13)
    assert steps(copy) == steps(alone)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_is_killed_is_started_again_and_nothing_is_lost(alone, copy, rank):
    process = learner(copy, TORCHRUN)
    at = random.randint(1, steps(alone) - 1)
    wait_until(lambda: (copy / "checkpoint/state.safetensors").exists() and steps(copy) >= at, process, copy)
    os.kill(workers(process)[rank], signal.SIGKILL)
    finished(process, copy)
    assert difference(alone, copy) <= 1e-6, f"killed rank {rank} after {at} steps"
    assert result(copy)["state"] == "trained"
    assert steps(copy) == steps(alone)


def test_two_torchruns_as_on_two_machines_share_a_round_and_both_begin_again_when_a_worker_of_one_dies(alone, copy):
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "test"]
    each = [TORCHRUN[0], "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", *meet, "--local-addr"]
    other = learner(copy, [*each, "127.0.0.2"])
    first = learner(copy, [*each, "127.0.0.1"])
    wait_until(lambda: steps(copy) >= 2, first, copy)
    os.kill(workers(other)[1], signal.SIGKILL)
    finished(first, copy)
    finished(other, copy)
    assert difference(alone, copy) <= 1e-6
    assert result(copy)["state"] == "trained"


def test_sigterm_of_torchrun_leaves_a_checkpoint_within_twenty_seconds(copy):
    write_manifest(copy, with_recipe(copy, t0_epochs=5000, checkpoint_seconds=60))
    process = learner(copy, TORCHRUN)
    wait_until(lambda: (copy / "progress.json").exists(), process, copy)
    begun = time.monotonic()
    process.terminate()
    process.wait(30)
    assert time.monotonic() - begun < 20
    assert (result(copy)["state"], result(copy)["reason"]) == ("paused", "SIGTERM")
    assert read_file(copy / "checkpoint/state.safetensors")[1]["cursor"]["step"] > 0


def test_a_worker_that_waits_for_the_others_can_be_ended(copy, monkeypatch):
    port = free_port()
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(key, value)
    process = learner(copy, [sys.executable])
    wait_until(lambda: listens(port), process, copy)
    process.terminate()
    try:
        assert process.wait(10) == -signal.SIGTERM
    finally:
        process.kill()


def listens(port):
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


def test_sigterm_of_one_worker_pauses_all_and_torchrun_starts_none_again(copy):
    write_manifest(copy, with_recipe(copy, t0_epochs=5000))
    process = learner(copy, TORCHRUN)
    wait_until(lambda: (copy / "progress.json").exists(), process, copy)
    os.kill(workers(process)[1], signal.SIGTERM)
    finished(process, copy)
    assert (result(copy)["state"], result(copy)["reason"]) == ("paused", "SIGTERM")


def test_workers_whose_torchrun_was_killed_pause_and_leave_the_round_free(copy):
    write_manifest(copy, with_recipe(copy, t0_epochs=5000))
    process = learner(copy, TORCHRUN)
    wait_until(lambda: (copy / "progress.json").exists(), process, copy)
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while not free(copy):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert read_file(copy / "checkpoint/state.safetensors")[1]["cursor"]["step"] > 0


def test_a_refusal_is_said_once_and_not_tried_again(copy):
    manifest = read_manifest(copy)
    manifest["images"][0]["range"] = "golden"
    write_manifest(copy, manifest)
    finished(learner(copy, TORCHRUN), copy)
    assert result(copy)["state"] == "stopped"
    assert "golden" in result(copy)["reason"]
    assert (copy / "log").read_text().count("stopped: ") == 1


def with_recipe(folder, **keys):
    manifest = read_manifest(folder)
    return manifest | {"recipe": manifest["recipe"] | keys}


def free(folder):
    try:
        with lock_round(folder):
            return True
    except RoundBusy:
        return False
