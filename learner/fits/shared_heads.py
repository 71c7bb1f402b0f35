"""Linear heads for few labels: one penalty for features of any width, and findings that learn from each other.

A finding with three positive images cannot teach a head of its own. Its head is the sum of one for this finding and one
for "any finding", whose share shrinks as the finding gets positives of its own. This is multi-task learning with a
shared mean (Evgeniou and Pontil, "Regularized multi-task learning", KDD 2004).
"""

import torch
from torch import Tensor

from learner.fits import logistic
from learner.fits.logistic import inverse_spread

STRENGTH = 5.0  # the penalty is D / (STRENGTH n): about the best of 1 to 20 in trials on the adults of bench/adults
ENOUGH = 10.0  # positive images with which a finding's own head weighs as much as the shared one


def penalty_for(features: Tensor, total: float) -> float:
    """Return the ridge penalty on the mean loss for features (N, D) and labels whose weights sum to `total`."""
    return features.shape[1] / (STRENGTH * max(total, 1.0))


def fit_heads(
    features: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    share: bool = True,
    positives: Tensor | None = None,
) -> logistic.LinearHead:
    """Return the head of all findings: features (N, D), targets (N, F) in [0, 1] with nan = unknown, weights (N, F).

    share: let findings learn from "any finding"; has no effect with one finding. positives: known positive images (F,) of
    each finding, None = all of the targets; pseudo-labels are not known.
    """
    known = ~targets.isnan()
    weight = known.double() if weights is None else weights.double() * known
    head = logistic.fit(features, targets, penalty_for(features, float(weight.sum(0).max())), weights)
    if not share or targets.shape[1] == 1:
        return head
    any_target, any_weight = any_finding(targets), weight.max(1, keepdim=True).values
    shared = logistic.fit(features, any_target, penalty_for(features, float(any_weight.sum())), any_weight)
    if positives is None:
        positives = (targets.nan_to_num(0.0) * weight).sum(0)
    return add_shared(head, shared, features, positives)


def any_finding(targets: Tensor) -> Tensor:
    """Return the target (N, 1) "at least one finding": the largest known target; nan where none is known."""
    largest = targets.nan_to_num(-1.0).max(1, keepdim=True).values
    return largest.where(largest >= 0, torch.nan)


def add_shared(
    head: logistic.LinearHead, shared: logistic.LinearHead, features: Tensor, positives: Tensor
) -> logistic.LinearHead:
    """Return head (F findings) plus the shared head (one), by ENOUGH / (ENOUGH + positives (F,)).

    Both have the same spread of logits over the features (N, D) first; the sum has the spread of the finding's own head.
    """
    own, common = head(features), shared(features)
    part = ENOUGH / (ENOUGH + positives.to(own))
    spread = own.std(0)
    usable = (inverse_spread(own) > 0) & (inverse_spread(common) > 0)
    stretch = torch.where(usable, part * spread * inverse_spread(common), 0.0)
    total = own + stretch * common
    scale = torch.where(usable, spread / total.std(0).clamp(min=1e-12), 1.0)
    weight = scale[:, None] * (head.weight + stretch[:, None] * shared.weight)
    bias = own.mean(0) - (features.to(weight) @ weight.T).mean(0)
    return logistic.LinearHead(weight, bias)
