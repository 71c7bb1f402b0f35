"""Shares of a blend: close to a prior, moved by how well each part answers labelled images that it was not fitted to.

With 80 labels, shares that follow the labels alone are worse than equal ones; the pull to the prior weakens as labels
are added (bench/adults/features_study.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from learner.fits import logistic
from learner.fits.logistic import inverse_spread
from learner.fits.shared_heads import fit_heads

FOLDS = 5
PULL = 24.0  # weight of the prior, in labelled images: the penalty on the mean loss is PULL / n
SLOPE = 1.5  # sum of the prior shares: standardised logits of a weak model are about that far from log odds
MOST = 600  # labelled images in the folds; more would only cost time
STEPS = 200  # of projected gradient descent


def held_out_logits(features: Sequence[Tensor], labels: Tensor, patients: Sequence[str], seed: int) -> list[Tensor]:
    """Return each part's logits (N, F) of images that its head was not fitted to: FOLDS folds by patient.

    features: (N, D) of each part; labels (N, F), nan = unknown. Logits of a finding without both classes in a fold are 0.
    """
    names = sorted(set(patients))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    fold_of = {names[at]: number % FOLDS for number, at in enumerate(order)}
    folds = torch.tensor([fold_of[patient] for patient in patients])
    result = [torch.zeros(labels.shape, dtype=torch.float64) for _ in features]
    for fold in range(FOLDS):
        inside, outside = folds != fold, folds == fold
        if outside.any() and inside.any():
            for rows, part in zip(result, features, strict=True):
                rows[outside] = fit_heads(part[inside], labels[inside])(part[outside])
    return result


def fit_shares(logits: Sequence[Tensor], labels: Tensor, prior: Tensor, pull: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return shares (P,) >= 0 and bias (F,) of P parts from held-out logits, (N, F) each, and labels (N, F).

    Minimises the mean log loss of sum_p share_p logits_p + bias, plus pull PULL / N |share - SLOPE prior|^2 / 2.
    """
    known = ~labels.isnan()
    table = torch.stack([(part - part.mean(0)) * inverse_spread(part) for part in logits])  # (P, N, F)
    rate = (labels.nan_to_num(0.0).sum(0) + 0.5) / (known.sum(0) + 1)
    count, wanted = max(1, len(labels)), SLOPE * prior / prior.sum()
    shares, bias = wanted.clone().double(), torch.logit(rate.double())
    truth, each = labels.nan_to_num(0.0).double(), known.double() / known.sum().clamp(min=1)
    weight = pull * PULL / count
    for _ in range(STEPS):
        error = each * ((torch.tensordot(shares, table, 1) + bias).sigmoid() - truth)
        slope = (table * error).sum((1, 2)) + weight * (shares - wanted)
        shares = (shares - slope / (1 + weight)).clamp(min=0)
        bias = bias - error.sum(0) / each.sum(0).clamp(min=1e-6)
    return shares, bias


def standardised(head: logistic.LinearHead, features: Tensor) -> logistic.LinearHead:
    """Return the head whose logits have mean 0 and standard deviation 1 over features (N, D); constant logits become 0."""
    logits = head(features)
    scale = inverse_spread(logits)
    weight = scale[:, None] * head.weight
    return logistic.LinearHead(weight, scale * (head.bias - logits.mean(0)))
