"""The last block for the class token only: outputs and gradients equal those of the whole block."""

import pytest
import torch

from learner.networks import class_token
from learner.networks.architecture import plan_of
from learner.networks.backbone import build

torch.set_num_threads(1)  # tiny tensors: a second thread only slows them down


def network(**changes):
    torch.manual_seed(0)
    plan = {**plan_of("vit_tiny_patch8_depth2", 32), "embed_dim": 24, "num_heads": 3, **changes}
    made = build(plan, drop_path=0.4).double().train()
    for parameter in made.parameters():  # biases, scales and position embeddings too
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def through(run, made, images):
    made.zero_grad()
    torch.manual_seed(1)  # stochastic depth
    out = run(images)
    (out.square().sum() + out.sum()).backward()
    return out.detach(), {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False}, {"qk_norm": True, "init_values": 0.1, "reg_tokens": 2}])
def test_the_class_token_and_all_gradients_equal_those_of_the_whole_block(changes):
    made, images = network(**changes), torch.rand(6, 1, 32, 32).double()

    def whole(images):
        return made.vit.norm(made.vit.blocks(made.embed(images)))[:, 0]

    def alone(images):
        *lower, last = made.vit.blocks
        tokens = torch.nn.Sequential(*lower)(made.embed(images))
        return made.vit.norm(class_token.class_token(last, tokens))[:, 0]

    ours, gradients = through(alone, made, images)
    theirs, all_gradients = through(whole, made, images)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert gradients.keys() == all_gradients.keys()
    for name, gradient in all_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-10)


def test_blocks_of_other_kinds_run_in_full():
    doubling = torch.nn.Module()
    doubling.forward = lambda tokens: 2 * tokens
    assert torch.equal(class_token.class_token(doubling, torch.ones(2, 3, 4)), torch.full((2, 1, 4), 2.0))


def without_mlp(block, tokens):
    return tokens[:, :1] + block.attn(block.norm1(tokens))[:, :1]


def of_a_patch(block, tokens):
    return block(tokens)[:, 1:2]


@pytest.mark.parametrize("wrong", [without_mlp, of_a_patch])
def test_every_property_notices_its_mutation(wrong, monkeypatch):
    monkeypatch.setattr(class_token, "class_token", wrong)
    with pytest.raises(AssertionError):
        test_the_class_token_and_all_gradients_equal_those_of_the_whole_block({})
