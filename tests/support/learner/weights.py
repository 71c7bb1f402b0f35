"""Comparisons of weights: of networks, and of safetensors files of rounds."""

import torch

from learner.engine.checkpoint import read_file


def same_weights(first, second):
    """Whether two safetensors files hold the same tensors, bit for bit."""
    tensors, expected = read_file(first)[0], read_file(second)[0]
    assert tensors.keys() == expected.keys()
    return all(torch.equal(tensors[key], expected[key]) for key in tensors)


def difference(first, second, file="final/state.safetensors"):
    """Return the largest difference of any number in two rounds, relative where above 1; without the biases of keys.

    Softmax is invariant to a bias that all keys share. So no output depends on it, its gradient is rounding noise, and
    Adam makes full steps of that noise.
    """
    tensors, expected = (read_file(folder / file)[0] for folder in (first, second))
    assert tensors.keys() == expected.keys()
    worst = 0.0
    for name, value in tensors.items():
        assert torch.equal(value.isnan(), expected[name].isnan()), name
        gap = ((value - expected[name]).abs() / value.abs().clamp(min=1)).nan_to_num(0.0)
        if name.endswith("qkv.bias"):
            query, _, key_value = gap.chunk(3)
            gap = torch.cat([query, key_value])
        worst = max(worst, gap.max().item())
    return worst


def copy_of(network):
    """Return a copy of a network's state dict."""
    return {key: value.clone() for key, value in network.state_dict().items()}


def same(first, second):
    """Whether two state dicts are equal, bit for bit."""
    return all(torch.equal(first[key], second[key]) for key in first)
