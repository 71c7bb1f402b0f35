"""Families of backbones: each is recognised by its tensors' names and has its own network's output to 1e-5."""

import argparse

import pytest
import torch
from safetensors.torch import load_file, save_file

from learner.errors import LearnerError
from learner.networks.backbone import build
from learner.pretrained.reader import read_pretrained
from tests.support.learner import backbone_files as files

torch.set_num_threads(1)  # tiny tensors: a second thread only slows them down

TOKENS = {
    "timm ViT": files.timm_vit,
    "DINO": files.dino,
    "DINOv2": files.dinov2,
    "DINOv2 with registers": files.dinov2_with_registers,
    "MAE (also MedMAE)": files.mae,
    "EVA-02 (also EVA-X)": files.eva_x,
}
ASIDE = {
    "timm ViT": {"head.weight", "head.bias"},
    "DINO": {f"module.head.{key}" for key in ("mlp.0.weight", "mlp.0.bias", "last_layer.weight_g", "last_layer.weight_v")},
    "DINOv2": {"mask_token"},
    "DINOv2 with registers": {"mask_token"},
    "MAE (also MedMAE)": {
        "mask_token", "decoder_embed.weight", "decoder_pos_embed", "decoder_blocks.0.attn.qkv.weight", "decoder_norm.weight",
        "decoder_pred.weight",
    },
    "EVA-02 (also EVA-X)": {"mask_token", "lm_head.weight", "lm_head.bias", "rope.freqs_cos"},
}  # fmt: skip


def opened(path):
    """Return what a file holds and the network with its weights, in eval mode."""
    read = read_pretrained(path).require_whole(str(path))
    net = build(read.plan, "timm").eval()
    net.load(read.tensors)
    return read, net


def saved(path, weights):
    save_file({key: value.contiguous().clone() for key, value in weights.items()}, path)
    return path


@torch.no_grad()
def assert_same_tokens(path, theirs):
    """All tokens but registers, which `tokens` also returns."""
    read, net = opened(path)
    torch.testing.assert_close(net.tokens(files.images()), theirs(files.images()), rtol=1e-5, atol=1e-5)
    return read


@pytest.mark.parametrize("family", TOKENS)
def test_a_file_of_each_family_has_the_tokens_of_its_own_network(tmp_path, family):
    weights, theirs = TOKENS[family]()
    read = assert_same_tokens(saved(tmp_path / "w.safetensors", weights), theirs)
    assert read.family == family
    assert set(read.set_aside) == ASIDE[family]
    assert set(read.matched) == set(weights) - ASIDE[family]
    assert (read.image_size, read.unused, read.missing) == (files.SIDE, (), ())


@pytest.mark.parametrize("registers", [False, True])
def test_a_dinov2_of_hugging_face_has_the_tokens_of_transformers(tmp_path, registers):
    path, theirs = files.hugging_face(tmp_path, registers)
    read = assert_same_tokens(path, theirs)
    assert (read.family, read.set_aside) == ("Hugging Face Dinov2", ("embeddings.mask_token",))
    assert set(read.matched) == set(load_file(path)) - set(read.set_aside)
    assert read.report()["arch"] == "vit_128wide_patch16_depth2" + ("_reg3" if registers else "")


@pytest.mark.parametrize("variant", [{"base": True}, {"split": True}])
def test_the_other_spellings_of_eva_02_have_the_same_tokens(tmp_path, variant):
    weights, theirs = files.eva_x(**variant)
    read = assert_same_tokens(saved(tmp_path / "w.safetensors", weights), theirs)
    assert set(read.matched) == set(weights) - set(read.set_aside)


@torch.no_grad()
def test_a_densenet_of_torchxrayvision_has_its_features_with_the_stated_mean_and_std(tmp_path):
    weights, theirs = files.xray_densenet()
    read, net = opened(saved(tmp_path / "w.safetensors", weights))
    (mean,), (std,) = read.mean, read.std
    ours = net((files.images(1) - mean) / std)
    torch.testing.assert_close(ours, theirs(files.images(1)), rtol=1e-5, atol=1e-5)
    assert (read.family, read.report()["arch"], read.image_size) == ("torchxrayvision DenseNet-121", "densenet121", 224)
    assert set(read.set_aside) == {"classifier.weight", "classifier.bias", "op_threshs"}


@pytest.mark.parametrize("family", [*TOKENS, "torchxrayvision"])
def test_unused_and_missing_tensors_are_named(tmp_path, family):
    weights, _ = TOKENS.get(family, files.xray_densenet)()
    gone = next(key for key in weights if key.endswith("norm1.weight"))
    prefix = "module.backbone." if family == "DINO" else ""
    changed = {key: value for key, value in weights.items() if key != gone} | {
        f"{prefix}adapter.weight": torch.zeros(3)
    }
    read = read_pretrained(saved(tmp_path / "w.safetensors", changed))
    assert read.unused == (f"{prefix}adapter.weight",)
    assert read.missing == (gone.removeprefix(prefix),)
    with pytest.raises(LearnerError, match=r"1 tensors unused: .*adapter\.weight; 1 tensors missing .*norm1\.weight"):
        read.require_whole("w.safetensors")


def test_a_tensor_of_another_shape_is_unused_and_missing(tmp_path):
    weights, _ = files.dinov2()
    weights["norm.weight"] = torch.zeros(7)
    read = read_pretrained(saved(tmp_path / "w.safetensors", weights))
    assert (read.unused, read.missing) == (("norm.weight",), ("norm.weight",))


def test_query_key_and_value_of_hugging_face_are_missing_together(tmp_path):
    path, _ = files.hugging_face(tmp_path)
    weights = load_file(path)
    gone = next(key for key in weights if "layer.1" in key and "key" in key and key.endswith("weight"))
    del weights[gone]
    read = read_pretrained(saved(tmp_path / "w.safetensors", weights))
    assert read.missing == ("blocks.1.attn.qkv.weight",)
    assert read.unused == tuple(sorted(gone.replace("key", part) for part in ("query", "value")))


def test_a_file_of_no_known_family_is_rejected_with_all_its_tensors_unused(tmp_path):
    path = saved(tmp_path / "w.safetensors", {"stem.weight": torch.zeros(3), "layers.0.bias": torch.zeros(2)})
    read = read_pretrained(path)
    assert (read.family, read.report()["arch"], read.unused) == (None, None, ("layers.0.bias", "stem.weight"))
    with pytest.raises(LearnerError, match="of no known family"):
        read.require_whole("w")


def test_a_gated_vision_transformer_is_rejected_by_name(tmp_path):
    weights, _ = files.dinov2()
    weights["blocks.0.mlp.fc1.weight"] = torch.zeros(2 * 512, 128)
    with pytest.raises(LearnerError, match="gated MLP"):
        read_pretrained(saved(tmp_path / "w.safetensors", weights))


def test_a_training_checkpoint_of_dino_gives_the_teacher_and_runs_no_code(tmp_path):
    """As DINO's main_dino.py saves it: both networks, the optimiser's state and the options."""
    teacher, theirs = files.dino()
    student = {key: torch.zeros_like(value) for key, value in teacher.items()}
    loaded = {
        "student": student, "teacher": teacher, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "epoch": 3,
        "args": argparse.Namespace(arch="vit_small"), "dino_loss": {"center": torch.zeros(1, 8)},
    }  # fmt: skip
    torch.save(loaded, tmp_path / "checkpoint.pth")
    read = assert_same_tokens(tmp_path / "checkpoint.pth", theirs)
    assert read.family == "DINO"
    assert all(key.startswith("teacher.module.backbone.") for key in read.matched)
    assert {key.split(".")[0] for key in read.set_aside} == {"student", "teacher", "optimizer", "dino_loss"}


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_a_pickle_with_other_objects_is_not_opened_and_the_error_says_how_to_convert(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    torch.save({"model": files.mae()[0], "more": Harm(tmp_path / "harm")}, path)
    with pytest.raises(LearnerError, match=r"Python objects besides tensors.*safetensors\.torch\.save_file"):
        read_pretrained(path)
    assert not (tmp_path / "harm").exists()
    path.write_bytes(b"not a pickle")
    with pytest.raises(LearnerError, match=r"can.t be read|Python objects"):
        read_pretrained(path)
