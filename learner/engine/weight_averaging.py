"""Averages of weights: the teacher that follows, a running mean over steps, a step between two models, a soup of many.

Knows networks and state dicts of one shape; which of the averages is served is decided elsewhere, on validation images.
Batch-norm statistics are averaged like weights, which says little of the mean network: `settle` measures them anew.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from learner.engine.optim import ema_update

Weights = dict[str, Tensor]


@torch.no_grad()
def ema_update_with_buffers(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- m teacher + (1 - m) student over the parameters; the buffers are copied."""
    ema_update(teacher, student, momentum)
    for old, new in zip(teacher.buffers(), student.buffers(), strict=True):
        old.copy_(new)


def running_mean(mean: Weights, new: Weights, count: int) -> Weights:
    """The mean of `count` weights and one more (stochastic weight averaging, Izmailov et al. 2018)."""
    return _blend(mean, new, 1 / (count + 1))


def wise(champion: Weights, candidate: Weights, a: float) -> Weights:
    """(1 - a) champion + a candidate (WiSE-FT, Wortsman et al. 2022); a = 0 and a = 1 are the two themselves."""
    if not 0 <= a <= 1:
        raise ValueError(f"a = {a}: give the candidate's share, between 0 and 1")
    return _blend(champion, candidate, a)


def soup(ingredients: Iterable[Weights]) -> Weights:
    """The mean of several models of one shape (Wortsman et al. 2022); raises ValueError for none."""
    mean: Weights | None = None
    for count, weights in enumerate(ingredients):
        mean = weights if mean is None else running_mean(mean, weights, count)
    if mean is None:
        raise ValueError("a soup of no weights: give at least one state dict")
    return {name: value.clone() for name, value in mean.items()}


@torch.no_grad()
def recompute_batch_norm(backbone: nn.Module, batches: Iterable[Tensor]) -> None:
    """Batch-norm statistics := those of these images, each batch alike; a network without any looks at none.

    What Izmailov et al. 2018 do after averaging. All else is in eval mode meanwhile.
    """
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    before, was = [norm.momentum for norm in norms], backbone.training
    backbone.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for a plain mean over batches
        norm.train()
    for images in batches:
        backbone(images)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    backbone.train(was)


@torch.no_grad()
def _blend(first: Weights, second: Weights, a: float) -> Weights:
    """(1 - a) first + a second, by name; a counter, which has no mean, is the second's unless a = 0."""
    differing = {n for n in first.keys() | second.keys() if _shape(first, n) != _shape(second, n)}
    if differing:
        raise ValueError(
            f"{len(differing)} weights differ in name or shape, first {min(differing)}: average models of one architecture"
        )
    return {
        name: torch.lerp(value, second[name], a)  # where both are the same, as in frozen blocks, exactly that
        if value.is_floating_point()
        else (second if a else first)[name].clone()
        for name, value in first.items()
    }


def _shape(weights: Weights, name: str) -> torch.Size | None:
    return weights[name].shape if name in weights else None
