"""Whole rounds from manifest to bundle parts: pauses, crashes, poisoned teachers, very few images."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from learner.__main__ import main
from learner.engine.checkpoint import load_state, read_file
from learner.engine.progress import ProgressWriter
from tests.support.learner.processes import start, wait_for
from tests.support.learner.round_folders import FINDINGS, card, make_round, read_manifest, result, write_manifest
from tests.support.learner.weights import same_weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained first round."""
    folder = make_round(tmp_path_factory.mktemp("trained") / "r")
    assert main([str(folder)]) == 0
    return folder


def test_a_first_round_exports_the_parts_of_two_bundles(trained):
    parts = ["card.json", "model.onnx", "probe.npz", "state.safetensors", "thresholds.json"]
    for name in ("t0", "final"):
        assert sorted(p.name for p in (trained / name).iterdir()) == parts
    assert result(trained)["state"] == "trained"
    assert (result(trained)["labelled"], result(trained)["unlabelled"]) == (6, 14)
    assert json.loads((trained / "progress.json").read_text())["phase"] == "done"
    assert (card(trained, "t0")["phase"], card(trained)["phase"]) == ("t0", "distil")
    assert not same_weights(trained / "t0/state.safetensors", trained / "final/state.safetensors")


def test_numbers_of_steps_and_corrections_are_those_of_the_recipe(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["phase"] == "t0" for row in rows) == 2 * 2  # 6 images in batches of 4, two epochs
    steps = 2 * 3  # 14 images in batches of 4, the short one dropped, two epochs
    bursts = len([s for s in range(steps) if s and s % 2 == 0])
    assert sum(row["phase"] == "distil" for row in rows) == steps + bursts * 2


def test_card_and_thresholds_have_the_measurements_and_their_rules(trained):
    values = card(trained)
    assert values["recipe"] == read_manifest(trained)["recipe"] | {"seed": 3}
    assert values["poison"] is False
    assert values["metrics"]["mass"]["n"] == 6
    assert values["parity"]["images"] == 6
    assert max(values["parity"]["1"], values["parity"]["8"]) <= 1e-3
    assert values["floor"]["line"] == "not shown better than raw pixels: macro AUC, effusion, mass"  # six patients
    assert [check["finding"] for check in values["floor"]["checks"]] == [None, *FINDINGS]
    limits = json.loads((trained / "final/thresholds.json").read_text())
    assert list(limits) == list(FINDINGS)
    for limit in limits.values():
        assert limit["rule"] in ("youden on calibration", "0.5: fewer than 5 of a class in calibration")
        assert limit["n"] == 12


def test_the_onnx_graph_takes_any_batch_size_and_equals_its_probe(trained):
    session = onnxruntime.InferenceSession(trained / "final/model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == "tensor(uint8)"
    assert session.get_inputs()[0].shape[1:] == [512, 512]
    with np.load(trained / "final/probe.npz") as probe:
        plates, logits = probe["plates"], probe["logits"]
    for samples in (1, 3, 8):
        ours, embedding, heat = session.run(["logits", "embedding", "heatmap"], {"plates": plates[:samples]})
        np.testing.assert_allclose(ours, logits[:samples], atol=1e-5)
        assert embedding.shape == (samples, 192)
        assert heat.shape == (samples, 2, 4, 4)


def test_finished_round_is_not_trained_again(trained):
    before = (trained / "final/model.onnx").stat().st_mtime_ns
    assert main([str(trained)]) == 0
    assert (trained / "final/model.onnx").stat().st_mtime_ns == before


def test_the_model_of_t0_is_saved_as_student_and_teacher(trained):
    weights, _ = read_file(trained / "t0/state.safetensors")
    pairs = [(key, key.replace("student.", "teacher.", 1)) for key in weights if key.startswith("student.")]
    assert pairs
    assert all(torch.equal(weights[mine], weights[theirs]) for mine, theirs in pairs)


def test_a_later_round_starts_from_its_parent_without_t0(trained, tmp_path):
    parent = {"bundle": "abc", "state": str(trained / "final/state.safetensors")}
    folder = make_round(tmp_path / "r", parent=parent, backbone="/nowhere.safetensors", seed=4)
    assert main([str(folder)]) == 0
    assert not (folder / "t0").exists()
    assert card(folder)["parent"] == "abc"


def test_a_parent_with_other_findings_is_rejected(trained, tmp_path):
    folder = make_round(tmp_path / "r", parent={"bundle": "abc", "state": str(trained / "t0/state.safetensors")})
    write_manifest(folder, read_manifest(folder) | {"findings": ["mass", "effusion"]})
    assert main([str(folder)]) == 3
    assert "parent abc has findings ['effusion', 'mass']" in result(folder)["reason"]


def test_a_parent_of_another_size_is_rejected(trained, tmp_path):
    parent = {"bundle": "abc", "state": str(trained / "t0/state.safetensors")}
    folder = make_round(tmp_path / "r", parent=parent, prototypes=64)
    assert main([str(folder)]) == 3
    assert "head.last_layer.weight_g is of shape [32, 1]" in result(folder)["reason"]


def test_pausing_after_every_step_changes_no_bit(trained, tmp_path, monkeypatch):
    """Covers feeds, corrections and stochastic depth; bit for bit, on the CPU."""
    folder, starts = make_round(tmp_path / "r"), 0
    step = ProgressWriter.write_step

    def step_and_pause(progress, state, losses):
        step(progress, state, losses)
        progress.signal_name = "one step"

    monkeypatch.setattr(ProgressWriter, "write_step", step_and_pause)
    while (code := main([str(folder)])) == 75:
        starts += 1
        assert result(folder)["reason"] == "one step"  # and not a signal from outside
    assert code == 0
    assert starts == 4 + 6 + 2 * 2  # steps of T=0, of the unlabelled images, and of corrections
    assert same_weights(trained / "t0/state.safetensors", folder / "t0/state.safetensors")
    assert same_weights(trained / "final/state.safetensors", folder / "final/state.safetensors")


def forget_moments(saved, state):
    load_state(saved, state)
    state.optimiser.state.clear()


def forget_burst(saved, state):
    load_state(saved, state)
    state.burst = None


@pytest.mark.parametrize("wrong", [forget_moments, forget_burst])
def test_a_resume_without_moments_or_burst_differs(trained, tmp_path, monkeypatch, wrong):
    """Pauses within a correction and resumes without Adam's moments, or without the rest of the correction."""
    folder, step = make_round(tmp_path / "r"), ProgressWriter.write_step

    def step_and_pause(progress, state, losses):
        step(progress, state, losses)
        if state.burst == 1:
            progress.signal_name = "one step"

    with monkeypatch.context() as patch:
        patch.setattr(ProgressWriter, "write_step", step_and_pause)
        assert main([str(folder)]) == 75
    monkeypatch.setattr("learner.engine.checkpoint.load_state", wrong)
    assert main([str(folder)]) == 0
    assert not same_weights(trained / "final/state.safetensors", folder / "final/state.safetensors")


def test_a_killed_and_restarted_round_equals_an_uninterrupted_one(trained, tmp_path):
    folder = make_round(tmp_path / "r", checkpoint_seconds=0)
    process = start(folder)
    wait_for(folder / "checkpoint/state.safetensors", process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "final").exists()
    assert main([str(folder)]) == 0
    assert same_weights(trained / "t0/state.safetensors", folder / "t0/state.safetensors")
    assert same_weights(trained / "final/state.safetensors", folder / "final/state.safetensors")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len((trained / "metrics.jsonl").read_text().splitlines())


def test_sigterm_saves_the_round_and_exits_75(tmp_path):
    folder = make_round(tmp_path / "r", t0_epochs=5000)
    process = start(folder)
    wait_for(folder / "progress.json", process)
    begun = time.monotonic()
    process.terminate()
    process.communicate()
    assert process.returncode == 75
    assert time.monotonic() - begun < 20
    assert (result(folder)["state"], result(folder)["reason"]) == ("paused", "SIGTERM")
    assert read_file(folder / "checkpoint/state.safetensors")[1]["cursor"]["step"] > 0
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_import_of_torch_pauses_the_round(tmp_path, number):
    folder = make_round(tmp_path / "r", t0_epochs=5000)
    process = start(folder)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert (result(folder)["state"], result(folder)["reason"]) == ("paused", number.name)


def test_the_end_of_the_window_pauses_and_a_later_window_resumes(tmp_path):
    folder = make_round(tmp_path / "r", until="2020-01-01T05:00:00+00:00")
    assert main([str(folder)]) == 75
    assert "the window ended at 2020-01-01" in result(folder)["reason"]
    write_manifest(folder, read_manifest(folder) | {"until": None})
    assert main([str(folder)]) == 0


def test_a_locked_round_is_not_trained(tmp_path, capsys):
    from learner.round.folder import lock_round

    folder = make_round(tmp_path / "r")
    with lock_round(folder):
        assert main([str(folder)]) == 1
    assert "another learner" in capsys.readouterr().err


def test_a_poisoned_teacher_is_recorded_in_the_card(tmp_path):
    folder = make_round(tmp_path / "r", poison_teacher=True)
    assert main([str(folder)]) == 0
    assert card(folder)["poison"] is True
    assert card(folder)["recipe"]["poison_teacher"] is True


def test_five_labelled_images_are_enough_for_a_model(tmp_path):
    folder = make_round(tmp_path / "r", train=(5, 0), validation=0, calibration=0, batch=16)
    assert main([str(folder)]) == 0
    values = card(folder)
    assert values["metrics"] == {name: {"auc": None, "n": 0} for name in FINDINGS}
    assert values["parity"]["images"] == 0
    assert values["floor"] is None
    limits = json.loads((folder / "final/thresholds.json").read_text())
    for limit in limits.values():
        assert (limit["threshold"], limit["rule"], limit["temperature"]) == (0.5, "0.5: no calibration labels", 1.0)
        assert limit["sensitivity"] is None


def test_a_finding_with_one_class_in_validation_has_no_auc(tmp_path):
    folder = make_round(tmp_path / "r", train=(5, 3), t0_epochs=1, epochs=1)
    manifest = read_manifest(folder)
    for sample in manifest["images"]:
        if sample["range"] == "validation":
            sample["labels"] = [None, 1]
    write_manifest(folder, manifest)
    assert main([str(folder)]) == 0
    assert card(folder)["metrics"] == {"effusion": {"auc": None, "n": 0}, "mass": {"auc": None, "n": 6}}


def test_a_round_with_a_single_image_is_trained(tmp_path):
    folder = make_round(tmp_path / "r", train=(1, 0), validation=0, calibration=0)
    assert main([str(folder)]) == 0


def test_batch_norm_with_one_value_per_channel_stops_the_round_with_that_reason(tmp_path):
    alone = {"prototypes": 0, "local_views": 0, "method": "kd", "kd_strategy": "base"}
    folder = make_round(tmp_path / "r", train=(1, 0), validation=0, calibration=0, arch="test_resnet", **alone)
    assert main([str(folder)]) == 3
    assert result(folder)["reason"].startswith("batch norm: a forward pass over one image leaves one value per channel")


def test_a_first_round_without_labels_is_rejected(tmp_path):
    folder = make_round(tmp_path / "r", train=(0, 8))
    assert main([str(folder)]) == 3
    assert "a first round needs labels" in result(folder)["reason"]


def test_a_golden_image_stops_the_round_before_training(tmp_path):
    folder = make_round(tmp_path / "r")
    manifest = read_manifest(folder)
    manifest["images"][7]["range"] = "golden"
    write_manifest(folder, manifest)
    assert main([str(folder)]) == 3
    assert "golden" in result(folder)["reason"]
    assert not (folder / "checkpoint").exists()
