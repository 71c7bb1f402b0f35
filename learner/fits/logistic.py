"""Logistic regression on fixed features, with soft targets and weights; the linear class head.

By Newton's method; by L-BFGS where both images and features are many, as Newton's equations then take minutes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 30  # of Newton's method at most; six to ten are usual
NEWTON_SIZE = 1000  # images or features, the fewer of both, up to which Newton is used
LBFGS_STEPS = 100
CONSTANT = 1e-6  # standard deviation up to which logits are constant: a finding without labels of both classes


@dataclass(frozen=True)
class LinearHead:
    """Logits (N, F) = features (N, D) @ weight.T + bias."""

    weight: Tensor  # (F, D)
    bias: Tensor  # (F,)

    def __call__(self, features: Tensor) -> Tensor:
        return features.to(self.weight.dtype) @ self.weight.T + self.bias


def inverse_spread(logits: Tensor) -> Tensor:
    """Return 1 / standard deviation (F,) of logits (N, F); 0 for constant ones, whose rounding errors would grow."""
    spread = logits.std(0)
    return torch.where(spread > CONSTANT, 1 / spread.clamp(min=CONSTANT), 0.0)


def fit(features: Tensor, targets: Tensor, penalty: float, weights: Tensor | None = None) -> LinearHead:
    """Return the head with the least mean weighted log loss + penalty / 2 |w|^2 on standardised features, in float64.

    features (N, D); targets (N, F) in [0, 1], nan = unknown; weights (N, F) or None. The bias has no penalty; the returned
    head takes unstandardised features. A finding without targets gets weights and bias 0; with one class, the bias is its
    shrunk log odds.
    """
    x = features.double()
    mean, scale = x.mean(0), x.std(0, correction=0)
    scale = torch.where(scale > 1e-9, scale, torch.ones_like(scale))
    x = (x - mean) / scale
    known = ~targets.isnan()
    if min(int(known.sum(0).max()), x.shape[1]) > NEWTON_SIZE:
        rows = known.any(1)
        weight, bias = _lbfgs(x[rows].float(), targets[rows], None if weights is None else weights[rows], penalty)
        return LinearHead(weight / scale, bias - weight / scale @ mean)
    columns = []
    for i in range(targets.shape[1]):
        weight = torch.ones_like(x[:, 0]) if weights is None else weights[:, i].double()
        columns.append(_newton(x[known[:, i]], targets[known[:, i], i].double(), weight[known[:, i]], penalty))
    weight = torch.stack([w for w, _ in columns]) / scale
    bias = torch.stack([b for _, b in columns]) - weight @ mean
    return LinearHead(weight, bias)


def _newton(x: Tensor, y: Tensor, weight: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Return weights (D,) and bias of one finding; x (N, D), y (N,), weight (N,).

    The weights are in the span of the images: with fewer images than features, solves N equations instead of D.
    """
    total = weight.sum()
    if not len(x) or total <= 0:
        return x.new_zeros(x.shape[1]), x.new_zeros(())
    share = ((weight * y).sum() + 0.5) / (total + 1)
    odds = torch.logit(share)
    if y.min() == y.max() and y.min() in (0.0, 1.0):
        return x.new_zeros(x.shape[1]), odds
    basis = torch.linalg.qr(x.T)[0] if len(x) < x.shape[1] else torch.eye(x.shape[1], dtype=x.dtype)
    design = torch.cat([x @ basis, x.new_ones(len(x), 1)], 1)
    ridge = x.new_full((design.shape[1],), penalty)
    ridge[-1] = 0.0
    weight, beta = weight / total, x.new_zeros(design.shape[1])
    beta[-1] = odds
    loss = _loss(design, y, weight, beta, ridge)
    for _ in range(STEPS):
        p = (design @ beta).sigmoid()
        slope = design.T @ (weight * (p - y)) + ridge * beta
        curve = (design * (weight * p * (1 - p))[:, None]).T @ design + torch.diag(ridge + 1e-9)
        step = torch.linalg.solve(curve, slope)
        while (new_loss := _loss(design, y, weight, beta - step, ridge)) > loss + 1e-12 and step.abs().max() > 1e-10:
            step = step / 2
        beta, loss = beta - step, new_loss
        if step.abs().max() < 1e-7:
            break
    return basis @ beta[:-1], beta[-1]


def _loss(design: Tensor, y: Tensor, weight: Tensor, beta: Tensor, ridge: Tensor) -> Tensor:
    """Return the weighted log loss plus penalty."""
    odds = design @ beta
    return (weight * (torch.nn.functional.softplus(odds) - y * odds)).sum() + 0.5 * (ridge * beta**2).sum()


def _lbfgs(x: Tensor, targets: Tensor, weights: Tensor | None, penalty: float) -> tuple[Tensor, Tensor]:
    """Return weights (F, D) and biases (F,), float64, of all findings together; x (N, D) standardised, float32."""
    each = (~targets.isnan()).float() if weights is None else weights.float() * ~targets.isnan()
    total = each.sum(0).clamp(min=1e-9)
    truth = targets.nan_to_num(0.0).float()
    weight = torch.zeros(targets.shape[1], x.shape[1], requires_grad=True)
    bias = torch.logit(((each * truth).sum(0) + 0.5) / (total + 1)).requires_grad_()
    solver = torch.optim.LBFGS([weight, bias], max_iter=LBFGS_STEPS, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        odds = x @ weight.T + bias
        each_loss = each * (torch.nn.functional.softplus(odds) - truth * odds)
        value = (each_loss.sum(0) / total).sum() + 0.5 * penalty * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return weight.detach().double(), bias.detach().double()
