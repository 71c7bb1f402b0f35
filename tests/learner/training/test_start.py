"""What a round starts from: mean and std of the backbone, and files whose content decides."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from learner.__main__ import main
from learner.errors import LearnerError
from learner.pretrained.reader import open_backbone, read_pretrained
from learner.round.backbone_file import content_hash
from learner.round.manifest import load
from learner.round.recipe import Recipe, resolve
from learner.training.run import Run
from learner.training.start import find_start
from tests.support.learner.round_folders import card, make_round, read_manifest, result, write_manifest

torch.set_num_threads(1)  # tiny tensors: a second thread only slows them down

STATED = {"mean": "[0.4, 0.5, 0.6]", "std": "[0.2, 0.2, 0.5]"}


def backbone(path, seed=0, **metadata):
    torch.manual_seed(seed)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=1, num_classes=0)
    save_file(vit.state_dict(), path, metadata or None)
    return str(path)


def recipe_of(folder):
    return find_start(load(folder), None).recipe


def test_mean_and_std_are_those_that_the_backbone_states_as_grey(tmp_path):
    folder = make_round(tmp_path / "r", backbone=backbone(tmp_path / "w.safetensors", **STATED))
    recipe = recipe_of(folder)
    assert (recipe.mean, recipe.std) == pytest.approx((0.5, 0.3))


def test_mean_and_std_of_the_recipe_stay_where_the_backbone_states_none(tmp_path):
    folder = make_round(tmp_path / "r", backbone=backbone(tmp_path / "w.safetensors"))
    assert (recipe_of(folder).mean, recipe_of(folder).std) == (0.5, 0.25)  # of the profile


@pytest.mark.parametrize("own", [{"mean": 0.1}, {"std": 0.9}, {"normalise": "recipe"}])
def test_mean_and_std_that_the_site_sets_win(tmp_path, own):
    folder = make_round(tmp_path / "r", backbone=backbone(tmp_path / "w.safetensors", **STATED), **own)
    recipe = recipe_of(folder)
    assert (recipe.mean, recipe.std) == (own.get("mean", 0.5), own.get("std", 0.25))


def test_a_manifest_from_before_keeps_the_mean_and_std_that_it_names(tmp_path):
    folder = make_round(tmp_path / "r", backbone=backbone(tmp_path / "w.safetensors", **STATED))
    written = read_manifest(folder)
    old = {key: value for key, value in written["recipe"].items() if key not in ("normalise", "backbone_sha256")}
    write_manifest(folder, written | {"recipe": old})
    assert (recipe_of(folder).mean, recipe_of(folder).std) == (0.5, 0.25)


def test_random_weights_use_the_recipe():
    assert resolve("evolve", "cpu").normalise == "recipe"
    assert resolve("evolve", "cpu", {"backbone": "w.safetensors"}).normalise == "backbone"
    assert Recipe().normalise == "recipe"


def test_nonsense_in_the_metadata_is_named(tmp_path):
    with pytest.raises(LearnerError, match="metadata mean = 'grey'"):
        read_pretrained(tmp_path / backbone(tmp_path / "w.safetensors", mean="grey"))
    folder = make_round(tmp_path / "r", backbone=backbone(tmp_path / "w.safetensors", mean="0.5", std="0"))
    with pytest.raises(LearnerError, match="std = 0"):
        recipe_of(folder)


def test_a_later_round_keeps_mean_and_std_without_the_file(tmp_path):
    file = backbone(tmp_path / "w.safetensors", **STATED)
    first = make_round(tmp_path / "first", backbone=file)
    assert main([str(first)]) == 0, result(first)
    assert card(first)["recipe"]["mean"] == pytest.approx(0.5)
    (tmp_path / "w.safetensors").unlink()
    parent = {"bundle": "abc", "state": str(first / "final/state.safetensors")}
    later = make_round(tmp_path / "later", parent=parent, backbone=file)
    assert (recipe_of(later).mean, recipe_of(later).std) == pytest.approx((0.5, 0.3))


def test_the_backbone_of_pretrain_states_its_mean_and_std(tmp_path):
    folder = make_round(tmp_path / "r", mean=0.3, std=0.2, ibot=0.5, lam=1.0, targets="none", epochs=1, t0_epochs=1)
    written = read_manifest(folder)
    write_manifest(folder, written | {"recipe": written["recipe"] | {"method": "pretrain", "name": "pretrain"}})
    assert main([str(folder)]) == 0, result(folder)
    read = read_pretrained(folder / "backbone.safetensors").require_whole("pretrain")
    assert (read.mean, read.std, read.image_size) == ((0.3,), (0.2,), 32)


def test_a_file_that_changed_since_the_round_was_planned_stops_the_round(tmp_path):
    file = backbone(tmp_path / "w.safetensors")
    planned = {"backbone": file, "backbone_sha256": content_hash(tmp_path / "w.safetensors")}
    folder = make_round(tmp_path / "r", **planned)
    backbone(tmp_path / "w.safetensors", licence="mit")  # the same tensors
    assert find_start(load(folder), None).weights
    backbone(tmp_path / "w.safetensors", seed=1)
    assert main([str(folder)]) == 3
    assert "its tensors have changed since the round was planned" in result(folder)["reason"]


def test_a_student_that_starts_again_needs_the_backbone_of_the_parent(tmp_path):
    """`pseudo-label` opens the backbone in every round; a file of the same shape with other tensors is another one."""
    small = {"lam": 0.0, "epochs": 1, "t0_epochs": 1, "finetune_epochs": 1, "prototypes": 0, "local_views": 0}

    def planned(name, seed, **changes):
        file = backbone(tmp_path / f"{name}.safetensors", seed)
        keys = {"backbone": file, "backbone_sha256": content_hash(tmp_path / f"{name}.safetensors")}
        folder = make_round(tmp_path / f"of_{name}", **changes)
        recipe = read_manifest(folder)["recipe"] | small | keys | {"method": "pseudo-label", "name": "pseudo-label"}
        write_manifest(folder, read_manifest(folder) | {"recipe": recipe})
        return folder

    first = planned("first", 0)
    assert main([str(first)]) == 0, result(first)
    parent = {"bundle": "abc", "state": str(first / "final/state.safetensors")}
    assert main([str(planned("copy", 0, parent=parent))]) == 0
    other = planned("other", 1, parent=parent)
    assert main([str(other)]) == 3
    assert "use the backbone that the parent was trained from" in result(other)["reason"]


def test_the_token_bank_is_built_again_for_other_tensors_in_the_same_file(tmp_path):
    file = tmp_path / "w.safetensors"
    keys = {"frozen_blocks": 1, "cached_views": 1, "local_views": 0}
    banks = []
    for seed, name in ((0, "first"), (0, "again"), (1, "other")):
        backbone(file, seed)
        folder = make_round(tmp_path / "r" / name, backbone=str(file), backbone_sha256=content_hash(file), **keys)
        run = Run(load(folder))
        assert len(run.token_bank.whole) == len(run.manifest.samples)
        banks.append(json.loads((folder / "tokens" / "key.json").read_text())["key"])
        run.progress.close()
    assert banks[0] == banks[1] != banks[2]


def test_a_pickle_is_not_trained_from_and_the_error_names_the_command(tmp_path):
    file = backbone(tmp_path / "w.safetensors")
    with safe_open(file, framework="pt") as opened:
        torch.save({key: opened.get_tensor(key) for key in opened.keys()}, tmp_path / "w.pth")  # noqa: SIM118
    with pytest.raises(LearnerError, match=r"cxrloop backbone fetch .*w\.pth --out w\.safetensors"):
        open_backbone(Recipe(backbone=str(tmp_path / "w.pth")))
