"""Rounds of `distl` that start from a pretrained backbone."""

import pytest
import torch

from learner.__main__ import main
from learner.data.plates import label_table
from learner.engine.checkpoint import read_file
from learner.fits import logistic
from learner.fits.head_refit import FEW_PENALTY
from learner.round.manifest import load
from learner.round.recipe import resolve
from learner.training.run import Run
from tests.support.learner.round_folders import make, result

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("profile", ["gpu", "cpu"])
def test_with_a_pretrained_backbone_the_class_head_is_linear_and_t0_small(profile):
    plain, pretrained = resolve("distl", profile), resolve("distl", profile, {"backbone": "vit.safetensors"})
    assert plain.class_hidden > 0
    assert pretrained.class_hidden == 0
    assert pretrained.t0_lr < plain.t0_lr


def test_t0_starts_from_a_class_head_fitted_to_the_frozen_features(tmp_path):
    first = make(tmp_path / "first", "pretrain", epochs=1, prototypes=16)
    assert main([str(first)]) == 0, result(first)
    keys = {"backbone": str(first / "backbone.safetensors"), "class_hidden": 0, "t0_lr": 1e-12}
    folder = make(tmp_path / "next", "distl", **keys)
    assert main([str(folder)]) == 0, result(folder)
    run = Run(load(folder))
    state = run.new_state("begun", run.schedule(run.unlabelled_feed(), 1, 1e-3))
    run.from_backbone(state)
    samples = run.manifest.labelled
    head = logistic.fit(run.embeddings(state.student, samples), label_table(samples), FEW_PENALTY)
    run.progress.close()
    trained = read_file(folder / "t0" / "state.safetensors")[0]
    weight = next(value for key, value in trained.items() if key.startswith("student.cls_head") and "weight" in key)
    torch.testing.assert_close(weight.double(), head.weight, atol=1e-5, rtol=1e-4)
    assert head.weight.abs().max() > 1e-3
