"""What takes all images of a step at once: KoLeo's nearest neighbours and Sinkhorn's balance over the whole batch.

When a batch is taken in parts or shared by ranks, its images are looked at once more beforehand, without gradients, and
their rows put together; so both are the same however much fits into memory. Knows no loss but these two.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from learner.engine import distributed
from learner.objectives.self_supervised import koleo

WholeBatchRows = dict[str, dict[int, Tensor]]  # by name, then by the first image of a part


def over_whole_batch(
    rows: Sequence[Tensor], width: int, make: Callable[[Tensor], Tensor], like: Tensor
) -> list[Tensor]:
    """`make` of the rows (n, width) of all parts and ranks in order; of its rows, those of this rank's parts."""
    table, mine = distributed.gather_rows(torch.cat([like.new_empty(0, width), *rows]))
    return list(make(table)[mine].split([len(part) for part in rows]))


def koleo_gradient(embeddings: Tensor) -> Tensor:
    """(B, D + 1): the gradient of KoLeo by each embedding (B, D), and beside it KoLeo's value."""
    with torch.enable_grad():
        leaf = embeddings.detach().requires_grad_()
        value = koleo(leaf)
        (slope,) = torch.autograd.grad(value, leaf)
    return torch.cat([slope, value.detach().expand(len(slope), 1)], 1)


def koleo_from_gradient(embeddings: Tensor, given: Tensor, share: float) -> Tensor:
    """A cost whose value times `share` adds up to KoLeo over the parts, and whose gradient times `share` is KoLeo's."""
    slope, value = given[:, :-1], given[0, -1]
    pull = (embeddings * slope).sum()
    return (pull - pull.detach()) / share + value
