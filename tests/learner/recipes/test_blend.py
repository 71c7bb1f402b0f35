"""`evolve` with its default keys: a blend of network and simple features, in every bundle and as the teacher."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from learner.__main__ import main
from learner.data.plates import label_table, read_plates
from learner.engine.checkpoint import read_file
from learner.fits.head_refit import blend_heads
from learner.fits.shared_heads import fit_heads
from learner.networks.blend import grey_levels, read_blend
from learner.recipes import evolve
from learner.round.manifest import Sample, load
from learner.round.recipe import resolve
from learner.training import blend_fit, head_fit
from learner.training.run import Run
from tests.support.learner.round_folders import make, read_manifest, result, write_manifest

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
BLEND = {"blend": True, "targets": "blend", "refit": "pseudo", "label_weight": 0.5, "lam": 0.1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A first round with the keys of the default recipe."""
    folder = make(tmp_path_factory.mktemp("round") / "r", **BLEND)
    assert main([str(folder)]) == 0, result(folder)
    return folder


def test_the_default_recipe_has_all_three_signals_and_the_blend():
    recipe = resolve("evolve", "gpu")
    assert recipe.blend
    assert recipe.targets == "blend"
    assert min(recipe.lam, recipe.label_weight, recipe.pseudo_weight) > 0


def test_without_a_backbone_the_default_recipe_is_that_of_the_tests():
    assert {key: getattr(resolve("evolve", "cpu"), key) for key in BLEND} == BLEND


@pytest.mark.parametrize("part", ["t0", "final"])
def test_the_exported_graph_answers_with_the_blend(finished, part):
    samples = load(finished).of("calibration")
    plates = read_plates(samples)
    session = onnxruntime.InferenceSession(finished / part / "model.onnx", providers=["CPUExecutionProvider"])
    logits, embedding, heatmap = session.run(None, {"plates": plates.numpy()})
    run = Run(load(finished))
    network, blend = run.new_network(), read_blend(extra(finished / part / "state.safetensors"))
    state = run.new_state("t0", run.schedule(run.unlabelled_feed(), 1, 1e-3))
    network.load_state_dict(
        {k.removeprefix("student."): v for k, v in tensors(finished / part).items() if k.startswith("student.")}
    )
    temperatures = torch.tensor(json.loads((finished / part / "card.json").read_text())["temperatures"])
    with torch.no_grad():
        expected = blend(
            grey_levels(plates),
            network.classify(run.feed(samples, "plain", 0, True).unaugmented(np.arange(len(samples)))),
        )
    np.testing.assert_allclose(logits, (expected / temperatures).numpy(), rtol=1e-3, atol=1e-3)
    assert heatmap.shape[:2] == logits.shape
    assert embedding.shape == (len(samples), state.student.backbone.dim)
    run.progress.close()


def tensors(folder):
    return read_file(folder / "state.safetensors")[0]


def extra(path):
    return {key.removeprefix("extra."): value for key, value in read_file(path)[0].items() if key.startswith("extra.")}


def test_the_teacher_of_the_next_round_is_the_blend_that_the_parent_serves(finished, tmp_path):
    folder = make(tmp_path / "next", **BLEND)
    manifest = read_manifest(folder)
    (folder / "parent.safetensors").write_bytes((finished / "final" / "state.safetensors").read_bytes())
    write_manifest(folder, manifest | {"parent": {"bundle": "b" * 12, "state": "parent.safetensors"}})
    run = Run(load(folder))
    state, samples = evolve.initial_state(run, run.from_parent), run.manifest.unlabelled
    with torch.no_grad():
        network = head_fit.logits_of(run, state.student, samples)
        answers = run.parent_blend()(grey_levels(read_plates(samples)), network)
    soft = evolve.pseudo_label_table(run, state, run.parent_blend())["soft"].cpu()
    labels = label_table(samples)
    for i in range(2):
        unknown = labels[:, i].isnan()
        order = answers[unknown, i].argsort()
        assert (soft[unknown, i][order].diff() > 0).all()  # the same order of images
        assert torch.equal(soft[~unknown, i], labels[~unknown, i])
    run.progress.close()


def test_a_parent_without_a_blend_teaches_with_its_network_alone(tmp_path):
    first = make(tmp_path / "first")
    assert main([str(first)]) == 0, result(first)
    folder = make(tmp_path / "next", **BLEND)
    (folder / "parent.safetensors").write_bytes((first / "final" / "state.safetensors").read_bytes())
    write_manifest(folder, read_manifest(folder) | {"parent": {"bundle": "b" * 12, "state": "parent.safetensors"}})
    assert main([str(folder)]) == 0, result(folder)
    assert read_blend(extra(folder / "final" / "state.safetensors"))


def test_pseudo_labels_count_less_than_labels_and_labels_are_kept():
    samples = load_samples()
    targets, weights = head_fit.with_pseudo_labels(samples, {1: torch.tensor([0.7, 0.1])})
    assert targets[0].tolist() == [1.0, 0.0]
    assert targets[1].tolist() == pytest.approx([0.7, 0.1])
    assert weights[:, 0].tolist() == pytest.approx([1.0, head_fit.PSEUDO_WEIGHT, 0.0])
    assert targets[2].isnan().all()


def load_samples():
    labels = [(1, 0), (None, None), (None, None)]
    return [Sample(i, f"p{i}", Path("plate.npy"), "train", known) for i, known in enumerate(labels)]


def test_the_labelled_images_come_first_where_there_are_more_images_than_fit(monkeypatch):
    monkeypatch.setattr(blend_fit, "FITTED_TO", 2)
    samples = load_samples()
    chosen = blend_fit.chosen_samples(samples[:1], samples, seed=0)
    assert chosen[0].image == 0
    assert len(chosen) == 2
    assert {sample.image for sample in chosen} < {0, 1, 2}


def test_a_resumed_round_has_the_same_blend(finished, tmp_path):
    again = make(tmp_path / "again", **BLEND)
    (again / "checkpoint").mkdir()
    saved = finished / "checkpoint" / "patches.safetensors"
    (again / "checkpoint" / "patches.safetensors").write_bytes(saved.read_bytes())
    assert main([str(again)]) == 0, result(again)
    one, two = tensors(finished / "final"), tensors(again / "final")
    assert all(torch.equal(one[key], two[key]) for key in one if key.startswith("extra.blend."))


def test_pool_grid_and_fewer_blocks_train_and_export(tmp_path):
    folder = make(tmp_path / "r", **BLEND, pool="grid", arch="vit_tiny_patch8_depth2")
    assert main([str(folder)]) == 0, result(folder)


def test_a_finding_without_labels_gets_no_pseudo_label_and_a_constant_answer(tmp_path):
    folder = make(tmp_path / "r", **BLEND)
    manifest = read_manifest(folder)
    for image in manifest["images"]:
        image["labels"][1] = None
    write_manifest(folder, manifest)
    assert main([str(folder)]) == 0, result(folder)
    table = read_file(folder / "checkpoint" / "targets.safetensors")[0]
    assert table["soft"][:, 1].isnan().all()
    assert table["weight"][:, 1].max() == 0
    assert table["weight"][:, 0].min() == 1
    plates = read_plates(load(folder).of("train")).numpy()
    for part in ("t0", "final"):
        session = onnxruntime.InferenceSession(folder / part / "model.onnx", providers=["CPUExecutionProvider"])
        logits = session.run(["logits"], {"plates": plates})[0]
        assert np.ptp(logits[:, 1]) < 1e-3
        assert np.ptp(logits[:, 0]) > 0.1


def test_the_weights_of_labels_count_in_the_fits():
    samples = load_samples()
    weights = torch.tensor([[2.0, 0.5], [0.0, 0.0], [0.0, 0.0]])
    _, with_pseudo = head_fit.with_pseudo_labels(samples, {1: torch.tensor([0.7, 0.1])}, weights)
    assert with_pseudo[0].tolist() == [2.0, 0.5]
    assert with_pseudo[1].tolist() == pytest.approx([head_fit.PSEUDO_WEIGHT] * 2)
    assert head_fit.with_pseudo_labels(samples, None, weights)[1][0].tolist() == [2.0, 0.5]


def test_a_head_is_the_mean_of_one_fitted_to_labels_and_one_fitted_to_pseudo_labels_too():
    draw = torch.Generator().manual_seed(3)
    features = torch.randn(40, 5, generator=draw, dtype=torch.float64)
    truth = features[:, :2] > 0.5
    samples = [
        Sample(i, f"p{i}", Path("x.npy"), "train", tuple(map(int, truth[i])) if i < 12 else (None, None))
        for i in range(40)
    ]
    pseudo = {i: torch.rand(2, generator=draw) for i in range(12, 40)}
    labels_alone = head_fit.fit_labels_and_pseudo_labels(features, samples, None)
    targets, weights = head_fit.with_pseudo_labels(samples, pseudo)
    with_pseudo = fit_heads(features, targets, weights, positives=truth[:12].sum(0).double())
    mean = head_fit.fit_labels_and_pseudo_labels(features, samples, pseudo)
    half = blend_heads(with_pseudo, labels_alone, features, 0.5)
    torch.testing.assert_close(mean.weight, half.weight)
    # pseudo-labels are not known positives: they do not weaken what findings learn from each other
    assert not torch.allclose(with_pseudo.weight, fit_heads(features, targets, weights).weight)
