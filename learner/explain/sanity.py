"""The sanity check of a saliency method: does its map die with the weights it claims to explain?

Weights are reset from the logit down, stage by stage, and each time the map is drawn again and compared in ranks with
the first one (Adebayo et al., NeurIPS 2018, cascading randomisation). Knows no method: it is given one that draws.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from learner.evaluation.auc import midranks
from learner.networks.backbone import timm_network
from learner.networks.heads import Network


def spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation of two maps' strength |.|; 0 when one of them is flat."""
    ranks = [midranks(made.detach().abs().flatten().double().cpu().numpy()) for made in (one, other)]
    spread = [rank - rank.mean() for rank in ranks]
    lengths = float(np.linalg.norm(spread[0]) * np.linalg.norm(spread[1]))
    return float(spread[0] @ spread[1]) / lengths if lengths else 0.0


def cascade(network: Network, draw: Callable[[Network], Tensor], seed: int = 0) -> list[tuple[str, float]]:
    """(stage, rank correlation with the untouched map), from the class head down to the last stage, which is everything.

    Resets the weights of `network`: give it a copy. Draws from torch's generator, seeded.
    """
    first = draw(network)
    torch.manual_seed(seed)
    said = []
    for name, part in stages(network):
        reset(part)
        said.append((name, spearman(first, draw(network))))
    return said


def stages(network: Network) -> Iterator[tuple[str, nn.Module]]:
    """The class head, the backbone's parts from the last to the first (sequences part by part), and all of it."""
    yield "class head", network.cls_head
    net = timm_network(network.backbone)
    for name, part in reversed(list(net.named_children())):
        if isinstance(part, nn.Sequential):
            yield from ((f"{name}.{key}", piece) for key, piece in reversed(list(part.named_children())))
        elif any(True for _ in part.parameters()):
            yield name, part
    yield "everything", net


@torch.no_grad()
def reset(module: nn.Module) -> None:
    """New weights: each part's own start, and a normal of deviation .02 for free parameters (positions, class token)."""
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()  # pyright: ignore[reportCallIssue]
        else:
            for parameter in part.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.02)
