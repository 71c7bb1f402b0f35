"""Heads for few labels: one penalty for all widths, findings that learn from each other, and shares of a blend."""

import pytest
import torch

from learner.evaluation.auc import auc
from learner.fits import logistic
from learner.fits.blend_shares import SLOPE, fit_shares, held_out_logits, standardised
from learner.fits.shared_heads import any_finding, fit_heads, penalty_for

torch.set_num_threads(1)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def sick_and_healthy(count, seed):
    """Return features (N, 60) and labels (N, 2): a common direction for both findings, and the second is rare."""
    noise = torch.randn(count, 60, generator=draw(seed))
    common = torch.rand(count, generator=draw(seed + 1)) < 0.5
    rare = common & (torch.rand(count, generator=draw(seed + 2)) < 0.15)
    direction = torch.zeros(60)
    direction[:10] = 0.5
    return noise + common[:, None].float() * direction, torch.stack([common, rare], 1).float()


def test_repeated_features_do_not_change_the_answers():
    features, labels = sick_and_healthy(80, 0)
    once, twice = fit_heads(features, labels)(features), fit_heads(features.repeat(1, 2), labels)(features.repeat(1, 2))
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-4)


def test_the_penalty_weakens_with_more_labels():
    features = torch.zeros(3, 100)
    assert penalty_for(features, 200.0) == pytest.approx(penalty_for(features, 100.0) / 2)


def test_a_rare_finding_learns_from_any_finding():
    gains = []
    for seed in range(0, 50, 10):
        features, labels = sick_and_healthy(80, seed)
        new, truth = sick_and_healthy(2000, seed + 5)
        alone, shared = fit_heads(features, labels, share=False)(new), fit_heads(features, labels)(new)
        gains.append(auc(shared[:, 1].numpy(), truth[:, 1].numpy()) - auc(alone[:, 1].numpy(), truth[:, 1].numpy()))
    assert min(gains) > -0.02
    assert sum(gains) / len(gains) > 0.02


def test_one_finding_alone_is_a_plain_logistic_regression():
    features, labels = sick_and_healthy(80, 0)
    plain = logistic.fit(features, labels[:, :1], penalty_for(features, 80.0))
    torch.testing.assert_close(fit_heads(features, labels[:, :1]).weight, plain.weight)


def test_any_finding_is_the_largest_known_target():
    nan = float("nan")
    targets = torch.tensor([[0.0, 1.0], [0.2, nan], [nan, nan], [0.0, 0.0]])
    assert any_finding(targets)[:, 0].nan_to_num(-1).tolist() == pytest.approx([1.0, 0.2, -1.0, 0.0])


def test_both_solvers_find_the_same_head(monkeypatch):
    features, labels = sick_and_healthy(300, 0)
    by_newton = logistic.fit(features, labels, 0.1)
    monkeypatch.setattr(logistic, "NEWTON_SIZE", 10)
    by_lbfgs = logistic.fit(features, labels, 0.1)
    torch.testing.assert_close(by_lbfgs(features), by_newton(features), rtol=1e-2, atol=1e-2)


def test_held_out_logits_come_from_heads_that_did_not_see_the_patient():
    features, labels = torch.randn(40, 60, generator=draw()), torch.randint(0, 2, (40, 1), generator=draw(1)).float()
    patients = [f"p{i // 2}" for i in range(40)]
    held_out = held_out_logits([features], labels, patients, 0)[0]
    inside = fit_heads(features, labels)(features)
    assert auc(inside[:, 0].numpy(), labels[:, 0].numpy()) > 0.95  # noise alone, learnt by heart
    assert auc(held_out[:, 0].numpy(), labels[:, 0].numpy()) < 0.8


def test_few_labels_leave_the_shares_near_the_prior_and_many_move_them():
    prior, moved = torch.tensor([1.0, 1.0]), []
    for count in (40, 4000):
        truth = torch.randint(0, 2, (count, 1), generator=draw()).double()
        good, useless = truth + 0.5 * torch.randn(count, 1, generator=draw(1)), torch.randn(count, 1, generator=draw(2))
        shares, _ = fit_shares([good.double(), useless.double()], truth.float(), prior)
        moved.append(shares)
    assert (moved[0] - SLOPE / 2).abs().max() < 0.35
    assert moved[1][0] > 2 * SLOPE / 2
    assert moved[1][1] < 0.2
    assert min(float(shares.min()) for shares in moved) >= 0


def test_standardised_logits_have_mean_0_and_spread_1_and_constant_ones_become_0():
    features, labels = sick_and_healthy(100, 0)
    logits = standardised(fit_heads(features, labels), features)(features)
    torch.testing.assert_close(logits.mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(logits.std(0), torch.ones(2, dtype=torch.float64))
    constant = logistic.LinearHead(torch.zeros(1, 60, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert standardised(constant, features)(features).abs().max() == 0
