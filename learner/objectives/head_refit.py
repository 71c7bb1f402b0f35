"""The class head's last word in `evolve`: what neighbours say of all images and what the labels say, as one linear answer.

Neighbours reach every image but err in groups, the labels' own regression errs image by image: their mean is worse than the
better of the two by little, and better than the worse by much (`bench/learning/evolution_refit.py`). Knows features and labels.
"""

import torch
from torch import Tensor

from learner.objectives import logistic
from learner.objectives.label_propagation import pseudo_labels
from learner.objectives.pseudo_targets import shrunk_prevalence

PENALTY = 0.02  # ridge of a head fitted on many soft answers
FEW_PENALTY = 0.1  # and of one fitted on the labelled images alone
LABEL_SHARE = 1 / 3  # the labels' own share of the mean
TRAINED_SHARE = 1 / 2  # and, of both beside a head that was trained, that head's


def fit_graph_and_labels(
    seen: Tensor, labels: Tensor, neighbours: int, components: int, weights: Tensor | None = None
) -> logistic.LinearHead:
    """The head for features (N, D) and labels (N, F), nan = unknown, from all images; weights (N, F) of labels or None."""
    soft = pseudo_labels(seen, labels, shrunk_prevalence(labels), neighbours, components)
    return blend_heads(logistic.fit(seen, soft, PENALTY), logistic.fit(seen, labels, FEW_PENALTY, weights), seen)


def blend_heads(
    first: logistic.LinearHead, second: logistic.LinearHead, seen: Tensor, share: float = LABEL_SHARE
) -> logistic.LinearHead:
    """`share` of the second and the rest of the first, after the second got the first's mean and spread on `seen`.

    Where one of them says the same of every image, for want of a class, the first stays as it is.
    """
    one, two = first(seen), second(seen)
    usable = (one.std(0) > 0) & (two.std(0) > 0)
    stretch = torch.where(usable, one.std(0) / two.std(0), 0.0)
    part = torch.where(usable, share, 0.0).to(one)
    weight = (1 - part)[:, None] * first.weight + (part * stretch)[:, None] * second.weight
    bias = first.bias + part * (one.mean(0) - first.bias) + part * stretch * (second.bias - two.mean(0))
    return logistic.LinearHead(weight, bias)


def combine_by_finding(
    findings: Tensor, first: logistic.LinearHead, second: logistic.LinearHead
) -> logistic.LinearHead:
    """The first's answer on these findings, bool (F,), and the second's on the others."""
    weight = torch.where(findings[:, None], first.weight, second.weight)
    return logistic.LinearHead(weight, torch.where(findings, first.bias, second.bias))
