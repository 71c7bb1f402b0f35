"""The lower blocks of a pretrained transformer."""

import pytest
import torch

from learner.errors import LearnerError
from learner.networks.architecture import plan_of
from learner.networks.backbone import build, timm_network
from learner.pretrained.depth import keep_lower_blocks

torch.set_num_threads(1)


def small(depth=6):
    torch.manual_seed(0)
    plan = plan_of(f"vit_tiny_patch16_depth{depth}", 32)
    return plan, timm_network(build(plan)).state_dict()


@pytest.mark.parametrize(("blocks", "kept"), [(0, 6), (-1, 4), (2, 2), (6, 6)])
def test_the_lowest_blocks_are_kept(blocks, kept):
    plan, weights = small()
    lower, tensors = keep_lower_blocks(plan, weights, blocks)
    assert lower["depth"] == kept
    assert {int(key.split(".")[1]) for key in tensors if key.startswith("blocks.")} == set(range(kept))


def test_the_kept_blocks_give_the_tokens_of_the_whole_network_at_that_depth():
    plan, weights = small()
    lower, tensors = keep_lower_blocks(plan, weights, -1)
    whole, part = build(plan).eval(), build(lower).eval()
    whole.load(weights)
    part.load(tensors)
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = whole.vit.norm(whole.run(whole.vit.blocks[:4], whole.embed(images)))
        torch.testing.assert_close(part.tokens(images), expected)


def test_more_blocks_than_the_backbone_has_is_an_error():
    with pytest.raises(LearnerError, match="the backbone has 6 blocks"):
        keep_lower_blocks(*small(), 7)


def test_random_weights_and_convolutional_networks_stay_whole():
    plan = {"timm": "resnet10t"}
    assert keep_lower_blocks(plan, {"conv1.weight": torch.zeros(1)}, -1) == (plan, {"conv1.weight": torch.zeros(1)})
    assert keep_lower_blocks(plan, None, -1) == (plan, None)
