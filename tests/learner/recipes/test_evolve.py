"""Rounds of `evolve` and `pretrain`: all losses in a step, frozen blocks, pseudo-labels, resuming."""

import json
from dataclasses import replace

import pytest
import torch

from learner.__main__ import main
from learner.data.plates import label_table
from learner.engine.checkpoint import read_file
from learner.engine.progress import ProgressWriter
from learner.fits import logistic
from learner.networks.heads import make_network
from learner.objectives import teacher_student as steps
from learner.pretrained.reader import read_pretrained
from learner.recipes import evolve
from learner.round.manifest import load
from learner.training import head_fit
from learner.training.run import Run
from tests.support.learner.round_folders import ALL, card, make, read_manifest, result, write_manifest

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

SOFT = {  # pseudo-labels of the teacher, weighted and balanced
    "lam": 1.0, "targets": "teacher", "align": True, "agree": "soft", "centring": "sinkhorn", "ibot": 0.5, "koleo": 0.1, "refit": "linear",
}  # fmt: skip


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def evolved(tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("evolved") / "r", **ALL)
    assert main([str(folder)]) == 0, result(folder)
    return folder


def test_a_step_has_all_losses(evolved):
    steps = [row for row in rows(evolved) if row.get("phase") == "evolve" and "loss" in row]
    assert len(steps) == 14 // 4
    assert {"dino", "ibot", "koleo", "pseudo", "replay", "labels", "teacher_kl"} <= steps[0].keys()
    said = [row for row in rows(evolved) if row.get("kind") == "pseudo"]
    assert len(said) == 1
    assert 0 < said[0]["pseudo_rate"] < 1


def test_the_note_about_pseudo_labels_survives_a_crash_before_the_first_checkpoint(tmp_path, monkeypatch):
    folder = make(tmp_path / "r")

    def crash(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr("learner.recipes.evolve.teacher_student_step", crash)
        main([str(folder)])
    assert (folder / "checkpoint/targets.safetensors").exists()
    monkeypatch.setattr("learner.training.run.Run.export", lambda *_: None)
    assert main([str(folder)]) == 0
    assert len([row for row in rows(folder) if row.get("kind") == "pseudo"]) == 1


def test_the_chosen_candidate_is_named_exported_and_kept(evolved):
    assert card(evolved)["candidate"] in (
        "refit", "teacher", "student", "soup", "swa", "wise 0.25", "wise 0.5", "wise 0.75",
    )  # fmt: skip
    assert card(evolved)["serve"] == "student"


def test_frozen_blocks_do_not_change_and_the_others_do(evolved):
    before, after = (read_file(evolved / name / "state.safetensors")[0] for name in ("t0", "final"))
    for key in ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"):
        assert torch.equal(before[f"student.backbone.vit.{key}"], after[f"student.backbone.vit.{key}"]), key
    key = "teacher.backbone.vit.blocks.1.attn.qkv.weight"  # the student may be the champion: see `choose_candidate`
    assert not torch.equal(before[key], after[key])


def test_caches_are_removed_after_the_round(evolved):
    assert not (evolved / "tokens").exists()
    assert not (evolved / "shard").exists()


@pytest.mark.parametrize("overrides", [{**ALL, "epochs": 4}, SOFT])
def test_pausing_after_every_step_changes_no_bit(tmp_path, monkeypatch, overrides):
    whole, folder = make(tmp_path / "whole", **overrides), make(tmp_path / "r", **overrides)
    assert main([str(whole)]) == 0
    step = ProgressWriter.write_step

    def step_and_pause(progress, state, losses):
        step(progress, state, losses)
        progress.signal_name = "one step"

    monkeypatch.setattr(ProgressWriter, "write_step", step_and_pause)
    starts = 0
    while (code := main([str(folder)])) == 75:
        starts += 1
        assert result(folder)["reason"] == "one step"  # and not a signal from outside
    assert (code, starts) == (0, 2 + 3 * overrides.get("epochs", 1))
    for name in ("t0/state", "checkpoint/evolve", "final/state"):
        first, second = (read_file(f / f"{name}.safetensors")[0] for f in (whole, folder))
        assert all(torch.equal(value.nan_to_num(9), second[key].nan_to_num(9)) for key, value in first.items()), name


@pytest.mark.parametrize("missing", ["", "koleo", "sinkhorn"])
def test_a_step_in_parts_equals_a_whole_one_only_with_the_rows_of_the_whole_batch(tmp_path, monkeypatch, missing):
    """KoLeo's neighbours and Sinkhorn's columns are those of the whole batch."""
    overrides = {**SOFT, "drop_path": 0.0, "centring": "centre" if missing == "koleo" else "sinkhorn"}
    run = Run(load(make(tmp_path / "r", **overrides)))
    if missing:
        monkeypatch.setattr(steps, "collect_whole_batch", lambda state, batch: {})
    losses, states = [], []
    for micro in (0, 3):
        state = run.new_state("evolve", run.schedule(run.unlabelled_feed(), 1, 1e-3))
        run.from_backbone(state)
        state.micro = micro
        table = {"champion": torch.randn(14, 2, generator=torch.Generator().manual_seed(0))}
        losses.append(
            steps.teacher_student_step(
                state, run.unlabelled_feed(), None, table | {"prevalence": torch.tensor([0.4, 0.4])}
            )
        )
        states.append(state)
    run.progress.close()
    same = all(
        torch.allclose(first.grad, second.grad, rtol=1e-3, atol=1e-6)
        for first, second in zip(*(state.student.parameters() for state in states), strict=True)
        if first.grad is not None
    ) and all(losses[0][key] == pytest.approx(losses[1][key], rel=1e-4) for key in ("dino", "ibot", "koleo", "pseudo"))
    assert same == (not missing)
    assert torch.equal(states[0].extra["scores"].isnan(), states[1].extra["scores"].isnan())
    torch.testing.assert_close(states[0].extra["scores"], states[1].extra["scores"], rtol=1e-4, atol=1e-5)


def test_stored_scores_are_the_teachers_newest_and_others_do_not_change(tmp_path):
    run = Run(load(make(tmp_path / "r", **SOFT)))
    state = run.new_state("evolve", run.schedule(run.unlabelled_feed(), 1, 1e-3))
    run.from_backbone(state)
    before = torch.randn(14, 2)
    batch = run.unlabelled_feed().batch(0, 0)
    with torch.no_grad():
        newest = state.teacher.classify(batch.views(slice(0, 4))[0])
    steps.teacher_student_step(
        state, run.unlabelled_feed(), None, {"champion": before, "prevalence": torch.tensor([0.4, 0.4])}
    )
    expected = before.clone()
    expected[batch.index] = newest
    torch.testing.assert_close(state.extra["scores"], expected)
    run.progress.close()


def test_soft_weights_of_the_graph_grow_with_the_distance_from_the_threshold(tmp_path):
    folder = make(tmp_path / "r", targets="graph", agree="soft")
    run = Run(load(folder))
    table = evolve.pseudo_label_table(run, evolve.initial_state(run, run.from_backbone))
    hidden = label_table(run.manifest.unlabelled).isnan()[:, 0]
    far = (torch.logit(table["soft"][hidden, 0])).abs()
    weight = table["weight"][hidden, 0]
    assert ((weight >= 0) & (weight <= 1)).all()
    assert weight.min() < 1 == weight.max()
    for side in (table["soft"][hidden, 0] > 0.5, table["soft"][hidden, 0] < 0.5):
        order = far[side].argsort()
        assert (weight[side][order].diff() >= 0).all()
    run.progress.close()


@pytest.mark.parametrize("agree", ["none", "teacher", "heads", "soft"])
def test_a_finding_with_one_class_has_no_pseudo_labels_for_any_agree(tmp_path, agree):
    folder = make(tmp_path / "r", targets="graph", agree=agree)
    manifest = read_manifest(folder)
    for sample in manifest["images"]:
        sample["labels"] = [sample["labels"][0], None if sample["labels"][0] is None else 0]
    write_manifest(folder, manifest)
    run = Run(load(folder))
    table = evolve.pseudo_label_table(run, evolve.initial_state(run, run.from_backbone))
    hidden = label_table(run.manifest.unlabelled).isnan()
    assert table["soft"][hidden[:, 1], 1].isnan().all()
    assert (table["weight"][hidden[:, 1], 1] == 0).all()
    assert (table["weight"][~hidden] == 1).all()
    assert not table["weight"].isnan().any()
    run.progress.close()


def test_split_labels_share_no_image_and_have_both_classes():
    labels = torch.tensor([[1.0, 0.0], [1.0, float("nan")], [0.0, 1.0], [0.0, 1.0], [float("nan"), 0.0]])
    first, second = evolve.split_labels(labels)
    assert not (~first.isnan() & ~second.isnan()).any()
    assert torch.equal(torch.where(first.isnan(), second, first).nan_to_num(9), labels.nan_to_num(9))
    assert all({0.0, 1.0} <= set(half[:, 0].tolist()) for half in (first, second))


def test_a_set_head_predicts_like_its_regression(evolved):
    round_ = load(evolved)
    torch.manual_seed(0)
    network = make_network(read_file(evolved / "t0/state.safetensors")[1]["plan"], replace(round_.recipe, ibot=0.0), 2)
    seen = torch.randn(30, network.backbone.dim)
    answer = logistic.fit(seen, (seen[:, :2] > 0).float(), 0.1)
    head_fit.set_head(network, answer)
    torch.testing.assert_close(network.cls_head(seen).double(), answer(seen), atol=1e-5, rtol=1e-4)
    directions = network.cls_head.gradient(seen)
    torch.testing.assert_close(directions, answer.weight.float().expand(30, -1, -1))


def test_labels_of_unlabelled_images_do_not_change_the_targets(evolved):
    table = read_file(evolved / "checkpoint/targets.safetensors")[0]
    labels = label_table(load(evolved).unlabelled)
    known = ~labels.isnan()
    assert torch.equal(table["soft"][known], labels[known])
    assert ((table["soft"][~known] > 0) & (table["soft"][~known] < 1)).all()


def test_pretraining_writes_a_backbone_for_later_rounds(tmp_path):
    folder = make(tmp_path / "r", "pretrain", epochs=2, prototypes=32, arch="vit_tiny_patch8_depth2")
    assert main([str(folder)]) == 0
    saved = read_pretrained(folder / "backbone.safetensors")
    plan, weights = saved.plan, saved.tensors
    trained = read_file(folder / "checkpoint/pretrain.safetensors")[0]
    assert all(torch.equal(value, trained[f"teacher.backbone.vit.{key}"]) for key, value in weights.items())
    assert plan["embed_dim"] == 192
    assert {row["phase"] for row in rows(folder)} == {"pretrain", "t0"}
    assert (folder / "t0").exists()
    follower = make(tmp_path / "next", backbone=str(folder / "backbone.safetensors"), frozen_blocks=-1)
    assert main([str(follower)]) == 0
    assert card(follower)["recipe"]["frozen_blocks"] == 1
    kept = read_file(follower / "final/state.safetensors")[0]
    first = {key: value for key, value in weights.items() if key.startswith(("patch_embed", "blocks.0"))}
    assert all(torch.equal(value, kept[f"student.backbone.vit.{key}"]) for key, value in first.items())


def test_pretraining_without_labels_writes_its_backbone_and_stops_with_a_reason(tmp_path):
    folder = make(tmp_path / "r", "pretrain", samples={"train": (0, 4)})
    assert main([str(folder)]) == 3
    assert "no labelled train image" in result(folder)["reason"]
    assert f"--backbone {folder / 'backbone.safetensors'}" in result(folder)["reason"]
    read_pretrained(folder / "backbone.safetensors").require_whole("backbone")


def test_a_round_keeps_the_head_shapes_of_a_parent_of_another_method(tmp_path):
    first = make(tmp_path / "first", "distl", class_hidden=16, pool="mean", prototypes=16)
    assert main([str(first)]) == 0
    parent = {"bundle": "abc", "state": str(first / "final/state.safetensors")}
    folder = make(tmp_path / "r", samples={"parent": parent})
    assert main([str(folder)]) == 0, result(folder)
    said = card(folder)["recipe"]
    assert (said["method"], said["class_hidden"], said["pool"], said["prototypes"]) == ("evolve", 16, "mean", 16)
