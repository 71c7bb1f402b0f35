"""Backbones by name, file and hub; interpolation of position embeddings; attribution to patches."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from learner.errors import LearnerError
from learner.networks.backbone import (
    build,
    fit_sizes,
    open_backbone,
    plan_of,
    read_weights,
    resample_pos_embed,
    resized,
    weights_of,
)
from learner.networks.heads import ClassHead
from learner.networks.mimetic_init import mimic_trained
from learner.round.recipe import resolve

torch.set_num_threads(1)  # tiny tensors: a second thread only slows them down

SHAPES = {
    "plain": {"img_size": 28, "patch_size": 14},
    "registers": {"img_size": 32, "patch_size": 8, "reg_tokens": 4, "no_embed_class": True},
    "layer scale": {"img_size": 48, "patch_size": 16, "init_values": 1e-5},
    "no qkv bias": {"img_size": 32, "patch_size": 16, "qkv_bias": False, "mlp_ratio": 2.0},
    "pre-norm": {"img_size": 32, "patch_size": 16, "pre_norm": True},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_plan_is_inferred_from_a_file(tmp_path, shape):
    vit = VisionTransformer(embed_dim=128, depth=3, num_heads=2, num_classes=0, **SHAPES[shape])
    save_file({k: v.half() for k, v in vit.state_dict().items()}, tmp_path / "w.safetensors")
    plan, weights = read_weights(tmp_path / "w.safetensors")
    again = build(plan, "timm")
    again.vit.load_state_dict(weights)
    vit.load_state_dict(weights)
    images = torch.rand(2, 3, SHAPES[shape]["img_size"], SHAPES[shape]["img_size"])
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images), vit.eval().forward_features(images)[:, 0])


def test_a_file_with_prefix_and_classifier_is_read(tmp_path):
    vit = VisionTransformer(img_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=1, num_classes=5)
    save_file({f"backbone.{k}": v for k, v in vit.state_dict().items()}, tmp_path / "w.safetensors")
    plan, weights = read_weights(tmp_path / "w.safetensors")
    assert (plan["embed_dim"], plan["depth"], plan["num_heads"]) == (64, 2, 1)
    assert not any("head" in key for key in weights)


def test_errors_name_unusable_files(tmp_path):
    with pytest.raises(LearnerError, match=r"missing\.safetensors"):
        read_weights(tmp_path / "missing.safetensors")
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "cnn.safetensors")
    with pytest.raises(LearnerError, match="no cls_token"):
        read_weights(tmp_path / "cnn.safetensors")
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04not a tensor file at all")
    with pytest.raises(LearnerError, match="can't be read"):
        read_weights(tmp_path / "pickle.safetensors")


def test_the_error_without_hub_names_the_option_for_a_file(tmp_path):
    """For each form of a model's name on the hub."""
    code = (
        "from learner.round.recipe import resolve; from learner.networks.backbone import open_backbone; from learner.errors import LearnerError\n"
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
        plan, weights = open_backbone(resolve("distl", "gpu"))
    assert weights is None
    assert (plan["embed_dim"], plan["depth"], plan["patch_size"], plan["img_size"]) == (384, 12, 16, 256)


def test_timm_names_are_built():
    backbone = build(plan_of("vit_tiny_patch16_224", 96), "timm")
    assert backbone(torch.rand(1, 1, 64, 64)).shape == (1, 192)


def test_the_patch_of_a_hybrid_includes_its_convolutions():
    backbone = build(plan_of("vit_tiny_r_s16_p8_224", 64), "timm").eval()
    embedding, trace = backbone.trace(torch.rand(1, 1, 64, 64))
    assert backbone.patch == 32
    assert trace.contributions(embedding[:, None]).shape == (1, 1, 2, 2)


def test_a_file_may_have_a_hub_name_in_its_metadata(tmp_path):
    plan = {"timm": "test_resnet"}
    weights, _ = weights_of(build(plan), plan)
    save_file(weights, tmp_path / "net.safetensors", metadata={"timm": "timm/test_resnet.r160_in1k"})
    assert read_weights(tmp_path / "net.safetensors")[0] == {"timm": "test_resnet.r160_in1k"}


def test_image_sides_are_rounded_to_the_patch():
    with pytest.warns(UserWarning, match="256 -> 252 px"):
        recipe = fit_sizes(resolve("distl", "gpu"), build(plan_of("vit_tiny_patch14_depth1", 252)))
    assert (recipe.image_size, recipe.local_size) == (252, 126)


@pytest.mark.parametrize("name", ["distl", "evolve"])
def test_profile_cpu_trains_only_the_last_pretrained_block_with_a_warning(name):
    recipe = resolve(name, "cpu", {"backbone": "vit.safetensors"})
    with pytest.warns(UserWarning, match="profile cpu: the lower 11 of 12 blocks are frozen"):
        assert fit_sizes(recipe, build(plan_of("vit_tiny_patch16", 96))).frozen_blocks == 11
    assert fit_sizes(recipe, build(plan_of("resnet10t", 96))).frozen_blocks == 0


@pytest.mark.parametrize("name", ["kd", "pretrain"])
def test_kd_and_pretrain_halve_the_steps_of_t0_with_pretrained_weights(name):
    """A step of ViT-S/14 at 98 pixels takes 2 processor seconds, as long as ten steps of ViT-Ti."""
    few, many = resolve(name, "cpu", {"backbone": "vit.safetensors"}), resolve(name, "cpu")
    assert (few.frozen_blocks, few.t0_steps) == (0, many.t0_steps // 2)
    assert resolve(name, "cpu", {"backbone": "vit.safetensors", "t0_steps": 200}).t0_steps == 200


@pytest.mark.parametrize(
    ("name", "profile", "keys"),
    [
        ("evolve", "cpu", {}),  # random weights need training in all blocks
        ("evolve", "cpu", {"backbone": "vit.safetensors", "frozen_blocks": 0}),  # set by the site
        ("evolve", "gpu", {"backbone": "vit.safetensors"}),
        ("pretrain", "cpu", {"backbone": "vit.safetensors"}),
        ("kd", "cpu", {"backbone": "vit.safetensors"}),
        ("evolve", "cpu", {"frozen_blocks": -1}),  # not pretrained
    ],
)
def test_other_profiles_train_all_blocks(name, profile, keys):
    assert fit_sizes(resolve(name, profile, keys), build(plan_of("vit_tiny_patch16_depth2", 96))).frozen_blocks == 0


def test_mode_timm_resamples_positions_as_timm():
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=3, num_classes=0, dynamic_img_size=True
    ).eval()
    images = torch.rand(2, 3, 48, 40)
    with torch.no_grad():
        ours = build({"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3}, "timm").eval()
        ours.vit.load_state_dict(vit.state_dict())
        torch.testing.assert_close(ours(images), vit.forward_features(images)[:, 0])
    table = torch.rand(1, 17, 12)
    dino = resample_pos_embed(table, (4, 4), (6, 6), 1, "dino")
    assert not torch.allclose(dino, resample_pos_embed(table, (4, 4), (6, 6), 1, "timm"))
    assert torch.equal(dino[:, :1], table[:, :1])


def test_the_resized_copy_for_the_export_has_the_same_output():
    plan = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    backbone = build(plan, "dino").eval()
    images = torch.rand(2, 1, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(resized(backbone, plan, 48).eval()(images), backbone(images))


def test_contributions_of_patches_sum_to_the_logit_for_pool_mean():
    plan = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    backbone, head = build(plan, pool="mean").double().eval(), ClassHead(24, 2, 16).double()
    images = torch.rand(2, 1, 32, 32).double()
    embedding, trace = backbone.trace(images)
    torch.testing.assert_close(embedding, backbone(images))
    slope = head.gradient(embedding)
    torch.testing.assert_close(trace.contributions(slope).flatten(2).sum(-1), (slope * embedding[:, None]).sum(-1))


def test_mimetic_weights_have_the_products_of_trained_attention():
    vit = build({"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 1, "num_heads": 3}).vit
    mimic_trained(vit)
    query, key, value = vit.blocks[0].attn.qkv.weight.chunk(3)
    added = vit.blocks[0].attn.proj.weight @ value
    looked = query.T @ key / 3
    assert added.diagonal().mean().item() == pytest.approx(-0.4, abs=0.1)
    assert looked.diagonal().mean() > 10 * (looked - looked.diagonal().diag()).mean().abs()
    table = vit.pos_embed[0, 1:]
    near, far = (table[0] @ table[1]).item(), (table[0] @ table[15]).item()
    assert near > far


def test_contributions_of_patches_equal_the_last_attentions_part_of_a_logit():
    """The sum over all tokens equals the derivative of the logit along what the attention adds to the class token."""
    torch.manual_seed(0)
    plan = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "init_values": 0.5}
    backbone, head = build(plan, "dino").double().eval(), ClassHead(24, 2, 16).double()
    images = torch.rand(1, 3, 32, 32).double()
    cls, trace = backbone.trace(images)
    torch.testing.assert_close(cls, backbone(images))
    maps = trace.contributions(head.gradient(cls))
    assert maps.shape == (1, 2, 4, 4)
    block = backbone.vit.blocks[-1]
    tokens = backbone.vit.blocks[:-1](backbone.embed(images))
    heads = (
        trace.value.transpose(1, 2) * trace.attention.transpose(1, 2)[..., None]
    )  # contribution of each token, by head
    added = block.ls1(torch.nn.functional.linear(heads.flatten(2), block.attn.proj.weight))  # (1, tokens, D)
    torch.testing.assert_close(
        added.sum(1) + block.ls1(block.attn.proj.bias), block.ls1(block.attn(block.norm1(tokens)))[:, 0]
    )
    before = trace.last.detach().requires_grad_()
    for i in range(2):
        slope = torch.autograd.grad(head(backbone.vit.norm(before))[0, i], before)[0]
        torch.testing.assert_close(maps[0, i].flatten(), (added[0, 1:] * slope).sum(-1))
