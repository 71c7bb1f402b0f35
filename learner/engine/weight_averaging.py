"""Averages of weights: EMA teacher, running mean over steps (SWA), WiSE-FT and model soups.

All weights must have the same names and shapes. Averaged batch-norm statistics do not fit the averaged weights:
`recompute_batch_norm` computes them again.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from learner.engine.optim import ema_update

Weights = dict[str, Tensor]


@torch.no_grad()
def ema_update_with_buffers(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Set the teacher's parameters to m teacher + (1 - m) student, m = `momentum`, and copy the buffers."""
    ema_update(teacher, student, momentum)
    for copy, value in zip(teacher.buffers(), student.buffers(), strict=True):
        copy.copy_(value)


def running_mean(mean: Weights, new: Weights, count: int) -> Weights:
    """Return the mean of `count + 1` weights from the mean of `count` and one more (SWA, Izmailov et al. 2018)."""
    return _blend(mean, new, 1 / (count + 1))


def wise(champion: Weights, candidate: Weights, a: float) -> Weights:
    """Return (1 - a) champion + a candidate, 0 <= a <= 1 (WiSE-FT, Wortsman et al., CVPR 2022); else ValueError."""
    if not 0 <= a <= 1:
        raise ValueError(f"a = {a}: give the candidate's share, between 0 and 1")
    return _blend(champion, candidate, a)


def soup(ingredients: Iterable[Weights]) -> Weights:
    """Return the mean of several models (Wortsman et al., ICML 2022); raises ValueError for none."""
    mean: Weights | None = None
    for count, weights in enumerate(ingredients):
        mean = weights if mean is None else running_mean(mean, weights, count)
    if mean is None:
        raise ValueError("a soup of no weights: give at least one state dict")
    return {name: value.clone() for name, value in mean.items()}


@torch.no_grad()
def recompute_batch_norm(backbone: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace batch-norm statistics by the mean over these batches (Izmailov et al. 2018); reads none without batch norm.

    The other modules are in eval mode meanwhile.
    """
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    momenta, was_training = [norm.momentum for norm in norms], backbone.training
    backbone.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch then takes the plain mean over batches
        norm.train()
    for images in batches:
        backbone(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    backbone.train(was_training)


@torch.no_grad()
def _blend(first: Weights, second: Weights, a: float) -> Weights:
    """Return (1 - a) first + a second by name; integer counters are the second's, or the first's where a = 0."""
    different = {n for n in first.keys() | second.keys() if _shape(first, n) != _shape(second, n)}
    if different:
        raise ValueError(
            f"{len(different)} weights differ in name or shape, first {min(different)}: average models of one architecture"
        )
    return {
        name: torch.lerp(value, second[name], a)  # exact where both are equal, as in frozen blocks
        if value.is_floating_point()
        else (second if a else first)[name].clone()
        for name, value in first.items()
    }


def _shape(weights: Weights, name: str) -> torch.Size | None:
    return weights[name].shape if name in weights else None
