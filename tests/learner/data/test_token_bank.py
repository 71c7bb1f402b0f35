"""The token bank: outputs of the frozen blocks for all views of an image, computed once."""

import os

import numpy as np
import pytest
import torch

from learner.__main__ import main
from learner.data import token_bank
from learner.engine.progress import ProgressWriter
from learner.errors import Paused
from learner.round.manifest import load
from learner.training.run import Run
from tests.support.learner.round_folders import ALL, make, read_manifest, result, write_manifest

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


def test_the_bank_holds_the_outputs_of_the_frozen_blocks(tmp_path):
    folder = make(tmp_path / "r", **ALL)
    run = Run(load(folder))
    state = run.new_state("t0", run.schedule(run.labelled_feed("t0"), 1, 1e-3))
    run.from_backbone(state)
    state.student.eval()
    samples = run.manifest.samples[:5]
    plain = make(tmp_path / "plain", **{**ALL, "frozen_blocks": 0})
    images = Run(load(plain)).feed(samples, "plain", 0, True).unaugmented(np.arange(5))
    with torch.no_grad():
        torch.testing.assert_close(
            run.token_bank.unaugmented(samples), state.student.backbone.lower(images), atol=5e-3, rtol=5e-3
        )
        whole = state.student.backbone(images)
        torch.testing.assert_close(run.embeddings(state.student, samples), whole, atol=2e-2, rtol=2e-2)
    run.progress.close()


def test_the_bank_is_built_once_and_again_for_another_recipe(tmp_path, monkeypatch):
    folder = make(tmp_path / "r", **ALL)
    filled, fill = [], token_bank._fill

    def counted(*arguments):
        filled.append(1)
        fill(*arguments)

    monkeypatch.setattr(token_bank, "_fill", counted)
    for changes in ({}, {}, {"rotate": 3.0}):
        write_manifest(folder, read_manifest(folder) | {"recipe": read_manifest(folder)["recipe"] | changes})
        run = Run(load(folder))
        assert run.token_bank.whole.shape[:2] == (len(run.manifest.samples), 3)
        run.progress.close()
    assert len(filled) == 2


def test_the_end_of_the_window_interrupts_building_the_bank(tmp_path, monkeypatch):
    folder, filled = make(tmp_path / "r", **ALL), []
    write_manifest(folder, read_manifest(folder) | {"until": "2020-01-01T05:00:00+00:00"})
    monkeypatch.setattr(token_bank, "AT_ONCE", 4)
    monkeypatch.setattr(
        ProgressWriter, "write_progress", lambda progress, phase, done, of: filled.append((phase, done))
    )
    assert main([str(folder)]) == 75
    assert filled == [("tokens", 4)]
    assert "the window ended" in result(folder)["reason"]


def test_a_signal_interrupts_computing_embeddings(tmp_path):
    run = Run(load(make(tmp_path / "r")))
    run.progress.signal_name = "SIGTERM"
    with pytest.raises(Paused, match="SIGTERM"):
        run.embeddings(run.new_network(), run.manifest.samples)
    run.progress.close()


def test_without_self_distillation_the_bank_has_no_local_views_and_the_same_global_ones(tmp_path):
    banks = {}
    for lam in (1.0, 0.0):
        run = Run(load(make(tmp_path / f"{lam}", **{**ALL, "lam": lam})))
        banks[lam] = run.token_bank
        run.progress.close()
    assert (banks[1.0].part.shape[1], banks[0.0].part.shape[1]) == (4, 0)
    assert np.array_equal(banks[1.0].whole, banks[0.0].whole)


def test_views_from_the_bank_are_the_unaugmented_an_augmented_and_different_local_ones(tmp_path):
    folder = make(tmp_path / "r", **ALL)
    run = Run(load(folder))
    batch = run.unlabelled_feed().batch(0, 0)
    views = batch.views(slice(0, batch.size))
    assert [tuple(view.shape) for view in views] == [(4, 17, 192)] * 2 + [(4, 5, 192)] * 2
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[2], views[3])
    again = run.unlabelled_feed().batch(0, 0).views(slice(0, 4))
    assert all(torch.equal(first, second) for first, second in zip(views, again, strict=True))
    run.progress.close()


@pytest.mark.parametrize("file", ["whole.npy", "part.npy", "key.json"])
def test_a_damaged_bank_is_built_again(tmp_path, file):
    folder = make(tmp_path / "r", **ALL)
    whole = Run(load(folder)).token_bank.whole.copy()
    os.truncate(folder / "tokens" / file, (folder / "tokens" / file).stat().st_size // 2)
    run = Run(load(folder))
    assert np.array_equal(run.token_bank.whole, whole)
    run.progress.close()


class Killed(BaseException):
    """Stands for the end of the process: nothing of the program may catch it and save."""


@pytest.mark.parametrize("end", [Killed, Paused])
def test_a_bank_under_way_resumes_and_equals_an_uninterrupted_one(tmp_path, monkeypatch, end):
    monkeypatch.setattr(token_bank, "AT_ONCE", 8)
    monkeypatch.setattr(token_bank, "SAVE_S", 0)
    whole = Run(load(make(tmp_path / "whole", **ALL)))
    expected = whole.token_bank
    folder = make(tmp_path / "r", **ALL)
    batches = []

    def report(phase):
        def stop(done, of):
            batches.append(done)
            if done == 16 and batches.count(16) == 1:
                raise end("here")

        return stop

    monkeypatch.setattr(ProgressWriter, "reporter", lambda progress, phase: report(phase))
    for _ in range(2):
        run = Run(load(folder))
        try:
            bank = run.token_bank
        except end:
            assert not (folder / "tokens").exists()
        run.progress.close()
    assert batches == [8, 16, 24, 32]  # the first two batches were computed once
    assert np.array_equal(bank.whole, expected.whole)
    assert np.array_equal(bank.part, expected.part)
    assert not (folder / token_bank.UNDER_WAY).exists()
    whole.progress.close()


def test_a_bank_under_way_of_another_recipe_is_not_resumed(tmp_path, monkeypatch):
    bank = token_bank.UnderWay(tmp_path / token_bank.UNDER_WAY, "one")
    bank.write("whole", np.arange(2), np.ones((2, 1, 3, 4), np.float16), 5)
    bank.done = 2
    bank.save()
    assert token_bank.UnderWay(tmp_path / token_bank.UNDER_WAY, "one").done == 2
    assert token_bank.UnderWay(tmp_path / token_bank.UNDER_WAY, "other").done == 0
