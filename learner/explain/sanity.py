"""The sanity check of a saliency method: a map must change when the weights are replaced by random ones.

Cascading randomisation (Adebayo et al., NeurIPS 2018): reset the weights stage by stage from the logit down, and compare
each map with that of the trained network by rank correlation.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from learner.evaluation.auc import midranks
from learner.networks.backbone import timm_network
from learner.networks.heads import Network


def spearman(first: Tensor, second: Tensor) -> float:
    """Return the rank correlation of the absolute values of two maps of equal shape; 0 where one is constant."""
    ranks = [midranks(values.detach().abs().flatten().double().cpu().numpy()) for values in (first, second)]
    spread = [rank - rank.mean() for rank in ranks]
    lengths = float(np.linalg.norm(spread[0]) * np.linalg.norm(spread[1]))
    return float(spread[0] @ spread[1]) / lengths if lengths else 0.0


def cascade(network: Network, draw: Callable[[Network], Tensor], seed: int = 0) -> list[tuple[str, float]]:
    """Return for each stage its name and the rank correlation of the map with that of the trained network.

    `draw` makes the map of a network. Overwrites the weights of `network`, so pass a copy; uses torch's generator.
    """
    trained = draw(network)
    torch.manual_seed(seed)
    correlations = []
    for name, module in stages(network):
        reset(module)
        correlations.append((name, spearman(trained, draw(network))))
    return correlations


def stages(network: Network) -> Iterator[tuple[str, nn.Module]]:
    """Yield the class head, the backbone's modules from last to first (sequences module by module), and the backbone."""
    yield "class head", network.cls_head
    net = timm_network(network.backbone)
    for name, child in reversed(list(net.named_children())):
        if isinstance(child, nn.Sequential):
            yield from ((f"{name}.{key}", inner) for key, inner in reversed(list(child.named_children())))
        elif any(True for _ in child.parameters()):
            yield name, child
    yield "everything", net


@torch.no_grad()
def reset(module: nn.Module) -> None:
    """Reset all weights: by `reset_parameters`, or from a normal distribution with std .02 (positions, class token)."""
    for inner in module.modules():
        if hasattr(inner, "reset_parameters"):
            inner.reset_parameters()  # pyright: ignore[reportCallIssue]
        else:
            for parameter in inner.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.02)
