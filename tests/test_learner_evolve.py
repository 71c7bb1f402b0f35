"""Rounds of `evolve` and `pretrain`: every signal in one step, frozen blocks from the bank, the choice at the end."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from learner import evolve as steps
from learner import tokens
from learner.__main__ import main
from learner.average import settle
from learner.backbone import read_weights
from learner.checkpoint import read_file
from learner.data import label_table
from learner.heads import make_network
from learner.progress import Teller
from learner.recipe import resolve
from learner.recipes import evolve
from learner.round_dir import load
from learner.run import Run
from tests.learner_site import TINY, card, make_round, read_manifest, result, write_manifest

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

SMALL = {**TINY, "class_hidden": 0, "pool": "both", "neighbours": 3, "components": 4, "epochs": 1, "t0_epochs": 1}
ALL = {  # every term, blocks frozen
    "arch": "vit_tiny_patch8_depth2", "frozen_blocks": 1, "cached_views": 2, "ibot": 0.5, "koleo": 0.1, "agree": "heads",
    "thresholds": True, "average": "all",
}  # fmt: skip

SOFT = {  # the teacher's answers, weighed and balanced
    "targets": "teacher", "align": True, "agree": "soft", "centring": "sinkhorn", "ibot": 0.5, "koleo": 0.1, "refit": "linear",
}  # fmt: skip


def make(folder, method="evolve", films=None, **overrides):
    folder = make_round(folder, **(films or {}))
    recipe = resolve(method, "demo", {**SMALL, **overrides})
    write_manifest(folder, read_manifest(folder) | {"recipe": recipe.to_dict()})
    return folder


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def evolved(tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("evolved") / "r", **ALL)
    assert main([str(folder)]) == 0, result(folder)
    return folder


def test_every_signal_is_in_the_step(evolved):
    steps = [row for row in rows(evolved) if row.get("phase") == "evolve" and "loss" in row]
    assert len(steps) == 14 // 4
    assert {"dino", "ibot", "koleo", "pseudo", "replay", "labels", "teacher_kl"} <= steps[0].keys()
    said = [row for row in rows(evolved) if row.get("kind") == "pseudo"]
    assert len(said) == 1
    assert 0 < said[0]["pseudo_rate"] < 1


def test_the_chosen_candidate_is_named_and_is_what_is_served_and_kept(evolved):
    assert card(evolved)["candidate"] in (
        "refit", "teacher", "student", "soup", "swa", "wise 0.25", "wise 0.5", "wise 0.75",
    )  # fmt: skip
    assert card(evolved)["serve"] == "student"


def test_frozen_blocks_stay_and_the_ones_above_move(evolved):
    before, after = (read_file(evolved / name / "state.safetensors")[0] for name in ("t0", "final"))
    for key in ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"):
        assert torch.equal(before[f"student.backbone.vit.{key}"], after[f"student.backbone.vit.{key}"]), key
    key = "teacher.backbone.vit.blocks.1.attn.qkv.weight"  # the student may have been set back: see `choose`
    assert not torch.equal(before[key], after[key])


def test_caches_are_gone_after_the_round(evolved):
    assert not (evolved / "tokens").exists()
    assert not (evolved / "shard").exists()


@pytest.mark.parametrize("overrides", [{**ALL, "epochs": 4}, SOFT])
def test_h_stopping_after_every_single_step_changes_no_bit(tmp_path, monkeypatch, overrides):
    whole, folder = make(tmp_path / "whole", **overrides), make(tmp_path / "r", **overrides)
    assert main([str(whole)]) == 0
    step = Teller.step

    def step_and_ask(teller, state, losses):
        step(teller, state, losses)
        teller.asked = "one step"

    monkeypatch.setattr(Teller, "step", step_and_ask)
    starts = 0
    while (code := main([str(folder)])) == 75:
        starts += 1
        assert result(folder)["reason"] == "one step"  # a signal from outside (timeout's SIGTERM) would be a pause too
    assert (code, starts) == (0, 2 + 3 * overrides.get("epochs", 1))
    for name in ("t0/state", "checkpoint/evolve", "final/state"):
        one, other = (read_file(f / f"{name}.safetensors")[0] for f in (whole, folder))
        assert all(torch.equal(value.nan_to_num(9), other[key].nan_to_num(9)) for key, value in one.items()), name


@pytest.mark.parametrize("missing", ["", "koleo", "sinkhorn"])
def test_a_step_in_parts_equals_the_whole_only_by_looking_ahead(tmp_path, monkeypatch, missing):
    """KoLeo's neighbours and Sinkhorn's columns are those of the batch; without the look ahead the test would notice."""
    overrides = {**SOFT, "drop_path": 0.0, "centring": "centre" if missing == "koleo" else "sinkhorn"}
    run = Run(load(make(tmp_path / "r", **overrides)))
    if missing:
        monkeypatch.setattr(steps, "look_ahead", lambda state, batch: {})
    told, states = [], []
    for micro in (0, 3):
        state = run.state("evolve", run.schedule(run.unlabelled(), 1, 1e-3))
        run.from_backbone(state)
        state.micro = micro
        table = {"champion": torch.randn(14, 2, generator=torch.Generator().manual_seed(0))}
        told.append(steps.evolve(state, run.unlabelled(), None, table | {"prevalence": torch.tensor([0.4, 0.4])}))
        states.append(state)
    run.teller.close()
    same = all(
        torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-6)
        for one, other in zip(*(state.student.parameters() for state in states), strict=True)
        if one.grad is not None
    ) and all(told[0][key] == pytest.approx(told[1][key], rel=1e-4) for key in ("dino", "ibot", "koleo", "pseudo"))
    assert same == (not missing)
    assert torch.equal(states[0].extra["scores"].isnan(), states[1].extra["scores"].isnan())
    torch.testing.assert_close(states[0].extra["scores"], states[1].extra["scores"], rtol=1e-4, atol=1e-5)


def test_scores_are_the_teachers_newest_and_those_of_other_films_stay(tmp_path):
    run = Run(load(make(tmp_path / "r", **SOFT)))
    state = run.state("evolve", run.schedule(run.unlabelled(), 1, 1e-3))
    run.from_backbone(state)
    before = torch.randn(14, 2)
    batch = run.unlabelled().batch(0, 0)
    with torch.no_grad():
        newest = state.teacher.classify(batch.views(slice(0, 4))[0])
    steps.evolve(state, run.unlabelled(), None, {"champion": before, "prevalence": torch.tensor([0.4, 0.4])})
    expected = before.clone()
    expected[batch.index] = newest
    torch.testing.assert_close(state.extra["scores"], expected)
    run.teller.close()


def test_soft_weights_of_the_graph_grow_with_the_distance_from_the_cut(tmp_path):
    folder = make(tmp_path / "r", agree="soft")
    run = Run(load(folder))
    table = evolve.targets(run, evolve.begun(run, run.from_backbone))
    hidden = label_table(run.round.unlabelled).isnan()[:, 0]
    far = (torch.logit(table["soft"][hidden, 0])).abs()
    weight = table["weight"][hidden, 0]
    assert ((weight >= 0) & (weight <= 1)).all()
    assert weight.min() < 1 == weight.max()
    for side in (table["soft"][hidden, 0] > 0.5, table["soft"][hidden, 0] < 0.5):
        order = far[side].argsort()
        assert (weight[side][order].diff() >= 0).all()
    run.teller.close()


@pytest.mark.parametrize("agree", ["none", "teacher", "heads", "soft"])
def test_a_finding_of_one_class_has_no_pseudo_label_and_weighs_nothing_whoever_has_to_agree(tmp_path, agree):
    folder = make(tmp_path / "r", agree=agree)
    manifest = read_manifest(folder)
    for film in manifest["films"]:
        film["labels"] = [film["labels"][0], None if film["labels"][0] is None else 0]
    write_manifest(folder, manifest)
    run = Run(load(folder))
    table = evolve.targets(run, evolve.begun(run, run.from_backbone))
    hidden = label_table(run.round.unlabelled).isnan()
    assert table["soft"][hidden[:, 1], 1].isnan().all()
    assert (table["weight"][hidden[:, 1], 1] == 0).all()
    assert (table["weight"][~hidden] == 1).all()
    assert not table["weight"].isnan().any()
    run.teller.close()


def test_the_running_mean_is_that_of_the_students_of_the_last_fifth_of_the_steps(tmp_path, monkeypatch):
    students, step = [], Teller.step

    def watched(teller, state, losses):
        if state.phase == "evolve":
            students.append({key: value.clone() for key, value in state.student.state_dict().items()})
        step(teller, state, losses)

    monkeypatch.setattr(Teller, "step", watched)
    folder = make(tmp_path / "r", average="all", epochs=4)
    assert main([str(folder)]) == 0
    assert len(students) == 12
    kept = read_file(folder / "checkpoint/evolve.safetensors")[0]
    for key, value in students[-1].items():
        torch.testing.assert_close(kept[f"extra.swa.{key}"], (students[-2][key] + value) / 2)
    assert not torch.equal(kept["extra.swa.head.last_layer.weight_v"], students[-1]["head.last_layer.weight_v"])
    assert not any(key.startswith("extra.") for key in read_file(folder / "final/state.safetensors")[0])


def test_the_running_mean_is_served_where_validation_prefers_it(tmp_path):
    run = Run(load(make(tmp_path / "r", films={"validation": 24}, refit="none", average="all")))
    final = run.state("evolve", run.schedule(run.unlabelled(), 1, 1e-3))
    champion = run.network()
    champion.load_state_dict(final.student.state_dict())
    answer = evolve.linear.fit(
        run.embeddings(champion, run.round.of("validation")), label_table(run.round.of("validation")), 0.1
    )
    evolve.set_head(final.student, answer)
    final.extra = {f"swa.{key}": value.clone() for key, value in final.student.state_dict().items()}
    for network in (champion, final.teacher, final.student):
        network.cls_head.load_state_dict({k: -v for k, v in final.student.cls_head.state_dict().items()})
    assert evolve.choose(run, final, champion) == "swa"
    torch.testing.assert_close(final.student.cls_head.mlp[-1].weight.double(), answer.weight)
    assert final.extra == {}
    run.teller.close()


def test_batch_norm_of_averaged_weights_is_measured_on_the_films(tmp_path):
    folder = make(tmp_path / "r", arch="test_resnet", average="all", refit="none", lam=0.0, prototypes=0, local_views=0)
    assert main([str(folder)]) == 0, result(folder)
    run = Run(load(folder))
    backbone = run.state("evolve", run.schedule(run.unlabelled(), 1, 1e-3)).student.backbone
    norm = next(module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d))
    came = []
    norm.register_forward_hook(lambda _, given, __: came.append(given[0].detach()))
    settle(backbone, evolve.originals(run))
    torch.testing.assert_close(norm.running_mean, came[0].mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, came[0].var((0, 2, 3)))
    assert (len(came), len(came[0])) == (1, 14)
    assert (norm.momentum, norm.training) == (0.1, True)
    run.teller.close()


def test_bank_holds_what_the_frozen_blocks_answer(tmp_path):
    folder = make(tmp_path / "r", **ALL)
    run = Run(load(folder))
    state = run.state("t0", run.schedule(run.labelled("t0"), 1, 1e-3))
    run.from_backbone(state)
    state.student.eval()
    films = run.round.films[:5]
    plain = make(tmp_path / "plain", **{**ALL, "frozen_blocks": 0})
    images = Run(load(plain)).feed(films, "plain", 0, True).originals(np.arange(5))
    with torch.no_grad():
        torch.testing.assert_close(
            run.bank.originals(films), state.student.backbone.lower(images), atol=5e-3, rtol=5e-3
        )
        whole = state.student.backbone(images)
        torch.testing.assert_close(run.embeddings(state.student, films), whole, atol=2e-2, rtol=2e-2)
    run.teller.close()


def test_bank_is_made_once_and_anew_for_another_recipe(tmp_path, monkeypatch):
    folder = make(tmp_path / "r", **ALL)
    filled, fill = [], tokens._fill

    def counted(*given):
        filled.append(1)
        fill(*given)

    monkeypatch.setattr(tokens, "_fill", counted)
    for changes in ({}, {}, {"rotate": 3.0}):
        write_manifest(folder, read_manifest(folder) | {"recipe": read_manifest(folder)["recipe"] | changes})
        run = Run(load(folder))
        assert run.bank.whole.shape[:2] == (len(run.round.films), 3)
        run.teller.close()
    assert len(filled) == 2


def test_views_of_the_bank_are_the_film_a_version_of_it_and_different_crops(tmp_path):
    folder = make(tmp_path / "r", **ALL)
    run = Run(load(folder))
    batch = run.unlabelled().batch(0, 0)
    views = batch.views(slice(0, batch.size))
    assert [tuple(view.shape) for view in views] == [(4, 17, 192)] * 2 + [(4, 5, 192)] * 2
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[2], views[3])
    again = run.unlabelled().batch(0, 0).views(slice(0, 4))
    assert all(torch.equal(one, other) for one, other in zip(views, again, strict=True))
    run.teller.close()


@pytest.mark.parametrize(("factor", "chosen"), [(-1.0, "champion"), (0.5, "teacher")])
def test_only_a_round_that_did_harm_is_taken_back(tmp_path, factor, chosen):
    run = Run(load(make(tmp_path / "r", films={"validation": 24}, refit="none", average="ema")))
    films = run.round.of("validation")
    final = run.state("evolve", run.schedule(run.unlabelled(), 1, 1e-3))
    champion = final.student
    seen = run.embeddings(champion, films)
    evolve.set_head(champion, evolve.linear.fit(seen, label_table(films), 1e-3))
    kept = {key: value.clone() for key, value in champion.state_dict().items()}
    final.student = run.network()
    final.student.load_state_dict(kept)
    for layer in final.student.cls_head.parameters():
        layer.data *= factor  # -1: every answer turned round; .5: the same order of films
    final.teacher.load_state_dict(final.student.state_dict())
    assert evolve.choose(run, final, champion) == chosen
    for key, value in final.student.state_dict().items():
        assert torch.equal(value, kept[key] * (factor if chosen == "teacher" and key.startswith("cls_head") else 1)), (
            key
        )
    run.teller.close()


def test_halves_share_no_film_and_hold_both_classes():
    labels = torch.tensor([[1.0, 0.0], [1.0, float("nan")], [0.0, 1.0], [0.0, 1.0], [float("nan"), 0.0]])
    one, other = evolve.halves(labels)
    assert not (~one.isnan() & ~other.isnan()).any()
    assert torch.equal(torch.where(one.isnan(), other, one).nan_to_num(9), labels.nan_to_num(9))
    assert all({0.0, 1.0} <= set(half[:, 0].tolist()) for half in (one, other))


def test_linear_head_answers_as_the_regression_it_was_given(evolved):
    round_ = load(evolved)
    torch.manual_seed(0)
    network = make_network(read_file(evolved / "t0/state.safetensors")[1]["plan"], replace(round_.recipe, ibot=0.0), 2)
    seen = torch.randn(30, network.backbone.dim)
    answer = evolve.linear.fit(seen, (seen[:, :2] > 0).float(), 0.1)
    evolve.set_head(network, answer)
    torch.testing.assert_close(network.cls_head(seen).double(), answer(seen), atol=1e-5, rtol=1e-4)
    directions = network.cls_head.gradient(seen)
    torch.testing.assert_close(directions, answer.weight.float().expand(30, -1, -1))


def test_hidden_labels_are_not_in_the_targets(evolved):
    table = read_file(evolved / "checkpoint/targets.safetensors")[0]
    labels = label_table(load(evolved).unlabelled)
    known = ~labels.isnan()
    assert torch.equal(table["soft"][known], labels[known])
    assert ((table["soft"][~known] > 0) & (table["soft"][~known] < 1)).all()


def test_pretraining_leaves_a_backbone_that_a_round_can_start_from(tmp_path):
    folder = make(tmp_path / "r", "pretrain", epochs=2, prototypes=32, arch="vit_tiny_patch8_depth2")
    assert main([str(folder)]) == 0
    plan, weights = read_weights(folder / "backbone.safetensors")
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


def test_a_round_goes_on_from_a_parent_of_another_method_with_its_shapes(tmp_path):
    first = make(tmp_path / "first", "distl", class_hidden=16, pool="mean", prototypes=16)
    assert main([str(first)]) == 0
    parent = {"bundle": "abc", "state": str(first / "final/state.safetensors")}
    folder = make(tmp_path / "r", films={"parent": parent})
    assert main([str(folder)]) == 0, result(folder)
    said = card(folder)["recipe"]
    assert (said["method"], said["class_hidden"], said["pool"], said["prototypes"]) == ("evolve", 16, "mean", 16)
