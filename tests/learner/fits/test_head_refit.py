"""The refit of the class head: the mean of heads fitted to graph and labels."""

import pytest
import torch

from learner.evaluation.auc import auc
from learner.fits import head_refit, logistic

NAN = float("nan")


def samples(seed=0, groups=12, each=25):
    """Return features (N, 6) in separate groups, truth (N,) along one direction, and labels (N, 1) of some images."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(groups, 6, generator=generator)
    seen = (centres[:, None] + torch.randn(groups, each, 6, generator=generator)).flatten(0, 1)
    truth = (seen[:, 0] + 0.5 * torch.randn(len(seen), generator=generator) > 0).float()
    labels = torch.full((len(seen), 1), NAN)
    some = torch.randperm(len(seen), generator=generator)[:24]
    labels[some, 0] = truth[some]
    return seen, truth, labels


def of(head, seen, truth):
    return auc(head(seen)[:, 0].numpy(), truth.numpy().astype(float))


def test_blended_heads_are_weighted_after_scaling_to_equal_spread():
    seen, _, labels = samples()
    first = logistic.fit(seen, labels, 0.02)
    second = logistic.LinearHead(40 * torch.roll(first.weight, 1, 1), first.bias - 7)
    mixed = head_refit.blend_heads(first, second, seen, 0.25)(seen)
    logits_1, logits_2 = first(seen), second(seen)
    alike = (logits_2 - logits_2.mean(0)) / logits_2.std(0) * logits_1.std(0) + logits_1.mean(0)
    torch.testing.assert_close(mixed, 0.75 * logits_1 + 0.25 * alike)


def test_a_finding_with_one_constant_head_keeps_the_first():
    seen, _, labels = samples()
    first = logistic.fit(seen, torch.cat([labels, labels], 1), 0.02)
    second = logistic.fit(seen, torch.cat([labels, torch.where(labels == 1, NAN, labels)], 1), 0.02)  # no positive
    mixed = head_refit.blend_heads(first, second, seen)
    torch.testing.assert_close(mixed.weight[1], first.weight[1])
    torch.testing.assert_close(mixed.bias[1], first.bias[1])
    swapped = head_refit.blend_heads(second, first, seen)
    torch.testing.assert_close(swapped.weight[1], second.weight[1])


def test_the_blend_is_better_at_its_worst_than_either_head():
    aucs = []
    for seed in range(12):
        seen, truth, labels = samples(seed)
        soft = head_refit.pseudo_labels(seen, labels, head_refit.shrunk_prevalence(labels), 5, 6)
        near, own = logistic.fit(seen, soft, head_refit.PENALTY), logistic.fit(seen, labels, head_refit.FEW_PENALTY)
        both = head_refit.fit_graph_and_labels(seen, labels, 5, 6)
        aucs.append([of(head, seen, truth) for head in (near, own, both)])
    near, own, both = torch.tensor(aucs).min(0).values
    assert both > min(near, own)
    assert both > near


def test_label_weights_change_the_fit():
    seen, _, labels = samples()
    weights = torch.where(labels == 1, 5.0, 1.0)
    assert not torch.allclose(
        head_refit.fit_graph_and_labels(seen, labels, 5, 6).weight,
        head_refit.fit_graph_and_labels(seen, labels, 5, 6, weights).weight,
    )


MUTATIONS = [
    (test_blended_heads_are_weighted_after_scaling_to_equal_spread, lambda a, b, seen, share=0.25: a),
    (test_a_finding_with_one_constant_head_keeps_the_first, lambda a, b, seen: logistic.LinearHead(
        (a.weight + b.weight) / 2, (a.bias + b.bias) / 2)),
    (test_the_blend_is_better_at_its_worst_than_either_head, lambda a, b, seen: a),
    (test_label_weights_change_the_fit, lambda a, b, seen: a),
]  # fmt: skip


@pytest.mark.parametrize(("test", "wrong"), MUTATIONS)
def test_every_property_notices_its_mutation(monkeypatch, test, wrong):
    monkeypatch.setattr(head_refit, "blend_heads", wrong)
    with pytest.raises(AssertionError):
        test()
