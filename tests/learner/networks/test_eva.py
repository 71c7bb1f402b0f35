"""EVA-02 transformers as the encoder: timm's own output, attribution, frozen blocks, and a whole round from EVA-X's names."""

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from learner.__main__ import main
from learner.errors import LearnerError
from learner.explain import saliency
from learner.networks.architecture import plan_of
from learner.networks.backbone import build, resized
from learner.networks.eva import EvaBackbone
from learner.networks.heads import ClassHead
from tests.support.learner import backbone_files
from tests.support.learner.round_folders import card, make_round, result

torch.set_num_threads(1)  # tiny tensors: a second thread only slows them down

PLAN = {
    "eva": True, "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0,
    "ref_feat_shape": [4, 4],
}  # fmt: skip
SEPARATE = {"qkv_fused": False, "scale_mlp": True}  # as EVA-X-B


def network(pool="cls", **changes):
    torch.manual_seed(0)
    made = build({**PLAN, **changes}, "timm", pool)
    for parameter in made.parameters():  # biases and norms too
        torch.nn.init.normal_(parameter, std=0.4)
    return made.double().eval()


@pytest.mark.parametrize("changes", [{}, SEPARATE])
def test_the_embedding_is_the_class_token_of_timm_at_any_square_size(changes):
    net = network(**changes)
    assert isinstance(net, EvaBackbone)
    for side in (32, 48):
        images = torch.rand(2, 3, side, side).double()
        with torch.no_grad():
            theirs = net.vit.forward_features(images)
            torch.testing.assert_close(net(images), theirs[:, 0])
            torch.testing.assert_close(net.tokens(images), theirs)
            torch.testing.assert_close(net.trace(images)[0], theirs[:, 0])


def test_frozen_blocks_give_tokens_from_which_the_others_go_on():
    net, images = network().freeze(1), torch.rand(2, 1, 48, 48).double()
    with torch.no_grad():
        torch.testing.assert_close(net(net.lower(images)), net(images))
    trained = {name.split(".")[1] for name, p in net.vit.named_parameters() if p.requires_grad and "blocks" in name}
    assert trained == {"1"}


@pytest.mark.parametrize("changes", [{}, SEPARATE])
def test_attentions_are_those_that_the_blocks_apply(changes):
    net, images = network(**changes), torch.rand(1, 1, 32, 32).double()
    with torch.no_grad():
        tokens = net.embed(images)
        for block, attention in zip(net.vit.blocks, net.attentions(images), strict=True):
            torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
            value = net.heads(block, tokens)[2]
            added = (attention @ value).transpose(1, 2).flatten(2) @ net.projection(block).T + block.attn.proj.bias
            theirs = block.attn(block.norm1(tokens), rope=net.rotation(tokens))
            torch.testing.assert_close(added, theirs)
            tokens = block(tokens, rope=net.rotation(tokens))


def test_contributions_of_patches_equal_the_last_attentions_part_of_a_logit():
    net, head = network(), ClassHead(24, 2, 16).double()
    cls, trace = net.trace(torch.rand(1, 3, 32, 32).double())
    maps = trace.contributions(head.gradient(cls))
    assert maps.shape == (1, 2, 4, 4)
    heads = trace.value.transpose(1, 2) * trace.attention.transpose(1, 2)[..., None]
    added = heads.flatten(2) @ net.projection(net.vit.blocks[-1]).T  # (1, tokens, D)
    before = trace.last.detach().requires_grad_()
    for i in range(2):
        slope = torch.autograd.grad(head(net.vit.norm(before))[0, i], before)[0]
        torch.testing.assert_close(maps[0, i].flatten(), (added[0, 1:] * slope).sum(-1))


def test_the_resized_copy_for_the_export_has_the_same_output():
    net, images = network(pool="both"), torch.rand(2, 1, 48, 48).double()
    with torch.no_grad():
        torch.testing.assert_close(resized(net, PLAN, 48).double().eval()(images), net(images))


def test_attention_maps_have_the_grid_of_the_patches():
    net, images = network(), torch.rand(2, 1, 32, 32).double()
    for method in (saliency.attention, saliency.rollout):
        assert method(net, images).shape[-2:] == (4, 4)


def test_timm_models_of_eva_02_are_built_and_others_of_its_module_are_rejected():
    with torch.device("meta"):  # no weights
        assert isinstance(build(plan_of("eva02_small_patch14_224", 224)), EvaBackbone)
        for name in ("vit_small_patch16_dinov3", "vit_medium_patch16_rope_reg1_gap_256", "eva_giant_patch14_224"):
            with pytest.raises(LearnerError, match="an EVA-02 transformer such as EVA-X"):
                build(plan_of(name, 224))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_whole_round_trains_and_exports_eva_x(tmp_path, frozen):
    weights, _ = backbone_files.eva_x()
    save_file({key: value.contiguous().clone() for key, value in weights.items()}, tmp_path / "eva_x.safetensors")
    keys = {"image_size": 64, "local_size": 32, "frozen_blocks": frozen, "pool": "both", "epochs": 1, "t0_epochs": 1}
    folder = make_round(tmp_path / "r", backbone=str(tmp_path / "eva_x.safetensors"), **keys)
    assert main([str(folder)]) == 0, result(folder)
    assert max(card(folder)["parity"]["1"], card(folder)["parity"]["8"]) <= 1e-3
    session = onnxruntime.InferenceSession(folder / "final/model.onnx", providers=["CPUExecutionProvider"])
    with np.load(folder / "final/probe.npz") as probe:
        logits, embedding, heat = session.run(["logits", "embedding", "heatmap"], {"plates": probe["plates"][:3]})
    assert (logits.shape, embedding.shape, heat.shape) == ((3, 2), (3, 256), (3, 2, 4, 4))
    assert np.isfinite(heat).all()
    assert np.ptp(heat) > 0
