"""The refit of the class head in `evolve`: the mean of a head fitted to the graph's pseudo-labels and one fitted to labels.

Pseudo-labels exist for every image but their errors are shared by neighbours; errors of the head fitted to labels are
independent. The mean is little worse than the better one and much better than the worse one
(`bench/learning/evolution_refit.py`).
"""

import torch
from torch import Tensor

from learner.fits import logistic
from learner.fits.label_propagation import pseudo_labels
from learner.fits.logistic import inverse_spread
from learner.objectives.pseudo_targets import shrunk_prevalence

PENALTY = 0.02  # ridge penalty of a head fitted to pseudo-labels of all images
FEW_PENALTY = 0.1  # ridge penalty of a head fitted to the labelled images
LABEL_SHARE = 1 / 3  # share of the head fitted to labels in the mean
TRAINED_SHARE = 1 / 2  # share of the trained head in the mean with that


def fit_graph_and_labels(
    features: Tensor, labels: Tensor, neighbours: int, components: int, weights: Tensor | None = None
) -> logistic.LinearHead:
    """Return the mean head of graph and labels, from features (N, D) of all images and labels (N, F), nan = unknown.

    neighbours, components: of `pseudo_labels`; weights: (N, F) of the labels, or None.
    """
    soft = pseudo_labels(features, labels, shrunk_prevalence(labels), neighbours, components)
    return blend_heads(
        logistic.fit(features, soft, PENALTY), logistic.fit(features, labels, FEW_PENALTY, weights), features
    )


def blend_heads(
    first: logistic.LinearHead, second: logistic.LinearHead, features: Tensor, share: float = LABEL_SHARE
) -> logistic.LinearHead:
    """Return (1 - share) first + share second, the second scaled to mean and standard deviation of the first.

    Both are measured on features (N, D). A finding with constant logits in one of the heads keeps the first head.
    """
    logits_1, logits_2 = first(features), second(features)
    usable = (inverse_spread(logits_1) > 0) & (inverse_spread(logits_2) > 0)
    stretch = torch.where(usable, logits_1.std(0) * inverse_spread(logits_2), 0.0)
    part = torch.where(usable, share, 0.0).to(logits_1)
    weight = (1 - part)[:, None] * first.weight + (part * stretch)[:, None] * second.weight
    bias = first.bias + part * (logits_1.mean(0) - first.bias) + part * stretch * (second.bias - logits_2.mean(0))
    return logistic.LinearHead(weight, bias)


def combine_by_finding(
    findings: Tensor, first: logistic.LinearHead, second: logistic.LinearHead
) -> logistic.LinearHead:
    """Return the first head for the findings where `findings`, bool (F,), is True, and the second head for the others."""
    weight = torch.where(findings[:, None], first.weight, second.weight)
    return logistic.LinearHead(weight, torch.where(findings, first.bias, second.bias))
