"""Backbones by name; interpolation of position embeddings; attribution to patches."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from learner.networks.architecture import plan_of
from learner.networks.backbone import build, fit_sizes, resized
from learner.networks.heads import ClassHead
from learner.networks.mimetic_init import mimic_trained
from learner.networks.vit import resample_pos_embed
from learner.round.recipe import resolve

torch.set_num_threads(1)  # tiny tensors: a second thread only slows them down


def test_timm_names_are_built():
    backbone = build(plan_of("vit_tiny_patch16_224", 96), "timm")
    assert backbone(torch.rand(1, 1, 64, 64)).shape == (1, 192)


def test_the_patch_of_a_hybrid_includes_its_convolutions():
    backbone = build(plan_of("vit_tiny_r_s16_p8_224", 64), "timm").eval()
    embedding, trace = backbone.trace(torch.rand(1, 1, 64, 64))
    assert backbone.patch == 32
    assert trace.contributions(embedding[:, None]).shape == (1, 1, 2, 2)


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
