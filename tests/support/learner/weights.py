"""Comparisons of weights: of networks, and of safetensors files of rounds."""

import torch

from learner.engine.checkpoint import read_file


def same_weights(one, other):
    mine, theirs = read_file(one)[0], read_file(other)[0]
    assert mine.keys() == theirs.keys()
    return all(torch.equal(mine[key], theirs[key]) for key in mine)


def difference(one, other, file="final/state.safetensors"):
    """Largest difference of any trained number, relative where it is above 1 (kept logits); but for the biases of keys.

    A bias that all keys share moves every score of a query alike, so softmax drops it, and no answer depends on it: its
    gradient is rounding noise, and Adam makes steps of noise.
    """
    mine, theirs = (read_file(folder / file)[0] for folder in (one, other))
    assert mine.keys() == theirs.keys()
    worst = 0.0
    for name, value in mine.items():
        assert torch.equal(value.isnan(), theirs[name].isnan()), name
        gap = ((value - theirs[name]).abs() / value.abs().clamp(min=1)).nan_to_num(0.0)
        if name.endswith("qkv.bias"):
            query, _, key_value = gap.chunk(3)
            gap = torch.cat([query, key_value])
        worst = max(worst, gap.max().item())
    return worst


def copy_of(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)
