"""Rounds that stop with a reason: damaged checkpoints and parents, diverged weights, no memory."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from learner.__main__ import main
from learner.engine.step import optimiser_step
from tests.support.learner.recipe_rounds import CLASS_LOSS_ONLY, CONVNET
from tests.support.learner.round_folders import make_round, read_manifest, result, write_manifest


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained first round."""
    folder = make_round(tmp_path_factory.mktemp("trained") / "r")
    assert main([str(folder)]) == 0
    return folder


def test_checkpoint_of_another_manifest_is_rejected(tmp_path):
    folder = make_round(tmp_path / "r", until="2020-01-01T05:00:00+00:00")
    assert main([str(folder)]) == 75
    write_manifest(folder, read_manifest(folder) | {"seed": 9})
    assert main([str(folder)]) == 3
    assert "belongs to another manifest" in result(folder)["reason"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def foreign(path):
    save_file({"weight": torch.zeros(2)}, path)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [cut, foreign, empty])
def test_a_damaged_checkpoint_is_named_and_without_it_the_round_starts(tmp_path, spoil):
    folder = make_round(tmp_path / "r", until="2020-01-01T05:00:00+00:00")
    assert main([str(folder)]) == 75
    spoil(folder / "checkpoint/state.safetensors")
    assert main([str(folder)]) == 3
    assert "state.safetensors" in result(folder)["reason"]
    (folder / "checkpoint/state.safetensors").unlink()
    assert main([str(folder)]) == 75


@pytest.mark.parametrize("spoil", [cut, foreign, empty])
def test_a_damaged_parent_is_named(trained, tmp_path, spoil):
    state = tmp_path / "parent.safetensors"
    shutil.copy(trained / "final/state.safetensors", state)
    spoil(state)
    folder = make_round(tmp_path / "r", parent={"bundle": "abc", "state": str(state)})
    assert main([str(folder)]) == 3
    assert "parent.safetensors" in result(folder)["reason"]


def test_weights_that_diverge_in_the_last_step_are_not_exported(tmp_path):
    """The last loss was finite: only the output of the network shows it."""
    keys = {"t0_epochs": 1, "t0_lr": 1e15, "warmup_epochs": 0}
    folder = make_round(tmp_path / "r", train=(4, 0), validation=0, calibration=0, **keys)
    assert main([str(folder)]) == 3
    assert "non-finite: logits of the probe" in result(folder)["reason"]
    assert not (folder / "t0").exists()


def test_running_out_of_memory_outside_of_a_step_stops_the_round(tmp_path, monkeypatch):
    folder = make_round(tmp_path / "r")
    monkeypatch.setattr("learner.training.run.prepare_device", lambda recipe: torch.empty(1 << 60))
    assert main([str(folder)]) == 3
    assert "out of memory outside of a step" in result(folder)["reason"]


@pytest.mark.parametrize(
    "keys",
    [{}, {**CLASS_LOSS_ONLY, "method": "kd", "kd_teacher": CONVNET}, {**CLASS_LOSS_ONLY, "method": "pseudo-label"}],
)
def test_the_note_about_halved_parts_reaches_the_card_in_a_later_process(tmp_path, monkeypatch, keys):
    """Memory runs out in the first step of T=0; later phases, also of other networks, keep the note."""
    folder = make_round(
        tmp_path / "r", train=(4, 0), validation=0, calibration=0, **{**keys, "t0_epochs": 1, "epochs": 1}
    )
    errors = [torch.OutOfMemoryError("full")]

    def full_once(*arguments, **named):
        if errors:
            raise errors.pop()
        return optimiser_step(*arguments, **named)

    def noted(run, name, state, *_, **__):
        seen[name] = [*state.notes]

    seen = {}
    monkeypatch.setattr("learner.objectives.distl_steps.optimiser_step", full_once)
    monkeypatch.setattr("learner.training.run.Run.export", noted)
    assert main([str(folder)]) == 0
    first = dict(seen)
    assert [note.split(" instead")[0] for note in first["t0"]] == ["out of memory: 2 images in a forward pass"]
    assert first["final"] == first["t0"]
    seen.clear()
    assert main([str(folder)]) == 0  # reads all phases
    assert seen == first
