"""Reading pretrained weights: plans from shapes, prefixes, metadata, names on the hub, and errors that name the tensors."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from learner.errors import LearnerError
from learner.networks.architecture import plan_of
from learner.networks.backbone import build
from learner.pretrained.reader import open_backbone, read_pretrained, weights_of
from learner.round.recipe import resolve

torch.set_num_threads(1)  # tiny tensors: a second thread only slows them down

SHAPES = {
    "plain": {"img_size": 28, "patch_size": 14},
    "registers": {"img_size": 32, "patch_size": 8, "reg_tokens": 4, "no_embed_class": True},
    "layer scale": {"img_size": 48, "patch_size": 16, "init_values": 1e-5},
    "no qkv bias": {"img_size": 32, "patch_size": 16, "qkv_bias": False, "mlp_ratio": 2.0},
    "pre-norm": {"img_size": 32, "patch_size": 16, "pre_norm": True},
}


def whole(path):
    read = read_pretrained(path).require_whole(str(path))
    return read.plan, read.tensors


@pytest.mark.parametrize("shape", SHAPES)
def test_the_plan_is_inferred_from_a_file(tmp_path, shape):
    vit = VisionTransformer(embed_dim=128, depth=3, num_heads=2, num_classes=0, **SHAPES[shape])
    save_file({k: v.half() for k, v in vit.state_dict().items()}, tmp_path / "w.safetensors")
    plan, weights = whole(tmp_path / "w.safetensors")
    again = build(plan, "timm")
    again.vit.load_state_dict(weights)
    vit.load_state_dict(weights)
    images = torch.rand(2, 3, SHAPES[shape]["img_size"], SHAPES[shape]["img_size"])
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images), vit.eval().forward_features(images)[:, 0])


def test_a_file_with_prefix_and_classifier_is_read(tmp_path):
    vit = VisionTransformer(img_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=1, num_classes=5)
    save_file({f"backbone.{k}": v for k, v in vit.state_dict().items()}, tmp_path / "w.safetensors")
    plan, weights = whole(tmp_path / "w.safetensors")
    assert (plan["embed_dim"], plan["depth"], plan["num_heads"]) == (64, 2, 1)
    assert not any("head" in key for key in weights)


def test_errors_name_unusable_files(tmp_path):
    with pytest.raises(LearnerError, match=r"missing\.safetensors"):
        whole(tmp_path / "missing.safetensors")
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "cnn.safetensors")
    with pytest.raises(LearnerError, match="no cls_token"):
        whole(tmp_path / "cnn.safetensors")
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04not a tensor file at all")
    with pytest.raises(LearnerError, match="can't be read"):
        whole(tmp_path / "pickle.safetensors")


def test_the_error_without_hub_names_the_option_for_a_file(tmp_path):
    """For each form of a model's name on the hub."""
    code = (
        "from learner.round.recipe import resolve; from learner.pretrained.reader import open_backbone; from learner.errors import LearnerError\n"
        "for prefix in ('', 'timm/', 'hf-hub:timm/'):\n"
        "    try: open_backbone(resolve('distl', 'demo', {'backbone': prefix + 'vit_tiny_patch16_224'}))\n"
        "    except LearnerError as error: print(error)"
    )
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=offline, check=True)
    assert out.stdout.count("the hub can't be reached") == 3
    assert "--backbone FILE" in out.stdout


def test_the_error_for_an_unknown_model_names_the_option_for_a_file():
    with pytest.raises(LearnerError, match="--backbone FILE"):
        open_backbone(resolve("distl", "demo", {"backbone": "vit_enormous"}))
    with pytest.raises(LearnerError, match="neither"):
        plan_of("resnet_of_mine", 96)


def test_random_weights_give_a_warning():
    with pytest.warns(UserWarning, match="random weights"):
        opened = open_backbone(resolve("distl", "gpu"))
    plan = opened.plan
    assert opened.tensors is None
    assert (plan["embed_dim"], plan["depth"], plan["patch_size"], plan["img_size"]) == (384, 12, 16, 256)


def test_a_file_may_have_a_hub_name_in_its_metadata(tmp_path):
    plan = {"timm": "test_resnet"}
    weights, _ = weights_of(build(plan), plan)
    save_file(weights, tmp_path / "net.safetensors", metadata={"timm": "timm/test_resnet.r160_in1k"})
    assert whole(tmp_path / "net.safetensors")[0] == {"timm": "test_resnet.r160_in1k"}
