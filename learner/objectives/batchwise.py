"""Losses that need all images of a step: KoLeo and Sinkhorn, for batches in parts or on several ranks.

An extra forward pass without gradients first collects the rows of all parts and ranks. So both losses are the same,
whatever the size of the parts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from learner.engine import distributed
from learner.objectives.self_supervised import koleo

WholeBatchRows = dict[str, dict[int, Tensor]]  # by loss ("dino", "ibot", "koleo"), then by the start of a part


def over_whole_batch(
    rows: Sequence[Tensor], width: int, make: Callable[[Tensor], Tensor], like: Tensor
) -> list[Tensor]:
    """Apply `make` to the rows (n, width) of all parts and ranks in order; return the result for each of this rank's parts.

    `like`: a tensor with the device and dtype to use where this rank has no rows.
    """
    table, mine = distributed.gather_rows(torch.cat([like.new_empty(0, width), *rows]))
    return list(make(table)[mine].split([len(part) for part in rows]))


def koleo_gradient(embeddings: Tensor) -> Tensor:
    """Return (B, D + 1): the gradient of KoLeo with respect to embeddings (B, D), and the value of KoLeo in the last column."""
    with torch.enable_grad():
        leaf = embeddings.detach().requires_grad_()
        value = koleo(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
    return torch.cat([gradient, value.detach().expand(len(gradient), 1)], 1)


def koleo_from_gradient(embeddings: Tensor, gradient_and_value: Tensor, share: float) -> Tensor:
    """Return KoLeo for a part of the batch, from rows of `koleo_gradient`.

    Times `share`, the part's share of the batch, the values of all parts add up to KoLeo and the gradients to its gradient.
    """
    gradient, value = gradient_and_value[:, :-1], gradient_and_value[0, -1]
    product = (embeddings * gradient).sum()
    return (product - product.detach()) / share + value
