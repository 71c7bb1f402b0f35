"""Targets, weights and masks against plain loops and second libraries; each test has a mutation that it detects."""

from math import exp
from statistics import fmean, pstdev

import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import ten_crop as torchvision_ten_crop

from learner.engine import weight_averaging
from learner.objectives import pseudo_targets, self_supervised
from tests.support.learner.golden_vectors import close

torch.set_num_threads(1)  # tiny tensors: a second thread only slows them down

UNKNOWN = float("nan")
SIDE = 14


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_masks_cover_the_drawn_share_of_the_drawn_images():
    numbers = uniform(1, 400, self_supervised.MASK_NUMBERS)
    masks = self_supervised.block_masks(numbers, SIDE)
    covered, chosen = masks.flatten(1).sum(1), numbers[:, 0] < 0.5
    assert torch.equal(covered[chosen].double(), ((0.1 + 0.4 * numbers[chosen, 1]) * SIDE**2).round())
    assert not covered[~chosen].any()
    assert self_supervised.block_masks(numbers, SIDE, chance=1.0).flatten(1).sum(1).min() >= round(0.1 * SIDE**2)


def test_a_mask_depends_only_on_its_numbers():
    numbers = uniform(2, 40, self_supervised.MASK_NUMBERS)
    masks = self_supervised.block_masks(numbers, SIDE, chance=1.0)
    assert torch.equal(self_supervised.block_masks(numbers[7:9], SIDE, chance=1.0), masks[7:9])
    assert len({mask.numpy().tobytes() for mask in masks}) == 40


def test_masks_are_blocks_of_patches():
    masks = self_supervised.block_masks(uniform(3, 200, self_supervised.MASK_NUMBERS), SIDE, chance=1.0)
    pairs = (masks[:, 1:] & masks[:, :-1]).sum() + (masks[:, :, 1:] & masks[:, :, :-1]).sum()
    assert pairs / masks.sum() > 1.4  # masked neighbours to the right and below: 2 in a large block
    assert masks.float().mean(0).min() > 0.05  # and every position is masked sometimes


def test_rectangles_have_the_drawn_position_and_shape():
    numbers = torch.full((1, self_supervised.MASK_NUMBERS), 0.5).double()
    numbers[:, 1] = 0.3
    numbers[:, 2 + 2 * self_supervised.BLOCKS : 2 + 3 * self_supervised.BLOCKS] = (
        0.0  # the flattest rectangles, all in the middle
    )
    rows, columns = self_supervised.block_masks(numbers, 30, chance=1.0)[0].nonzero().T
    assert (rows.max() - rows.min() + 1) / (columns.max() - columns.min() + 1) == pytest.approx(0.3, abs=0.05)
    numbers[:, 2 : 2 + 2 * self_supervised.BLOCKS] = double(0, 0, 1, 1, 0, 1, 0, 1)  # one to each corner
    mask = self_supervised.block_masks(numbers, 30, chance=1.0)[0]
    assert mask[[0, 0, -1, -1], [0, -1, 0, -1]].all()
    assert not mask[10:20].any()


def test_prevalence_of_few_images_shrinks_to_the_overall_rate():
    labels = torch.full((40, 3), UNKNOWN).double()
    labels[:, 0] = 0.0
    labels[:30, 0] = 1.0
    labels[:2, 1] = 0.0
    pooled = 30.5 / 43
    close(pseudo_targets.shrunk_prevalence(labels), double((30 + 10 * pooled) / 50, 10 * pooled / 12, pooled))
    assert pseudo_targets.shrunk_prevalence(torch.zeros(9, 2)).gt(0).all()


def test_the_filter_takes_its_ratio_from_other_images():
    scores, labels = normal(4, 50, 2), (uniform(5, 30, 2) < torch.tensor([0.1, 0.6])).double()
    ratios = pseudo_targets.shrunk_prevalence(labels).tolist()
    each = [pseudo_targets.kappa_filter(scores[:, i], ratios[i], 0.5) for i in range(2)]
    ours = pseudo_targets.kappa_labels(scores, labels, 0.5)
    torch.testing.assert_close(ours, torch.stack(each, 1), equal_nan=True)
    counts = torch.tensor([int(0.5 * ratio * 50) for ratio in ratios])
    assert torch.equal((ours == 1).sum(0), counts)
    assert counts[0] < counts[1]


def test_thresholds_are_quantiles_that_ignore_nan():
    scores = normal(6, 80, 2)
    scores[60:, 1] = UNKNOWN
    low, high = pseudo_targets.class_thresholds(scores, double(0.1, 0.3), 0.8)
    close(low, double(np.quantile(scores[:, 0], 0.8 * 0.9), np.quantile(scores[:60, 1], 0.8 * 0.7)))
    close(high, double(np.quantile(scores[:, 0], 1 - 0.08), np.quantile(scores[:60, 1], 1 - 0.24)))


def test_ties_become_negative_and_the_middle_is_left_out():
    labels = pseudo_targets.hard_labels(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor(2.0), torch.tensor(4.0))
    assert labels.nan_to_num(-1).tolist() == [0, 0, -1, 1]
    assert pseudo_targets.kappa_filter(torch.ones(6), 0.5, 1.0).tolist() == [0.0] * 6


def test_aligned_probabilities_approach_the_prevalence():
    logits, prevalence = normal(7, 4000, 2) + double(1, -3), double(0.1, 0.2)
    answers, mean = logits.sigmoid().mean(0), prevalence
    for _ in range(600):
        mean = pseudo_targets.move_mean(mean, answers, momentum=0.98)
    close(mean, answers, rtol=1e-4)
    # approximate: shifting logits by that of the mean is exact only for equal probabilities
    aligned = pseudo_targets.align(logits, mean, prevalence).sigmoid().mean(0)
    assert ((aligned - prevalence).abs() < 0.2 * (answers - prevalence).abs()).all()


def test_soft_weights_equal_a_plain_loop():
    logits, reference, cut = normal(8, 20, 3), 2 * normal(9, 60, 3), double(0.0, 0.5, 9.0)
    reference[50:] = UNKNOWN
    weights = pseudo_targets.soft_weights(logits, reference, cut)
    for sample in range(20):
        for finding in range(3):
            away = float(logits[sample, finding] - cut[finding])
            side = 1 if away > 0 else -1
            seen = [side * float(r - cut[finding]) for r in reference[:50, finding]]
            same = [s for s in seen if s > 0]
            short = min(side * away - fmean(same), 0)
            close(weights[sample, finding], exp(-(short**2) / (2 * pstdev(same) ** 2)))


def test_a_side_without_reference_has_weight_zero():
    weights = pseudo_targets.soft_weights(
        torch.tensor([[2.0], [-2.0]]), torch.tensor([[-1.0], [-1.5]]), torch.tensor([0.0])
    )
    assert weights.tolist() == [[0.0], [1.0]]


def test_agreement_is_one_for_equal_and_zero_for_opposite_heads():
    a, b = normal(10, 5, 3), normal(11, 5, 3)
    assert pseudo_targets.agreement(a, a).eq(1).all()
    assert torch.equal(pseudo_targets.agreement(a, b), pseudo_targets.agreement(b, a))
    close(pseudo_targets.agreement(double(50), double(-50)), double(0))
    assert pseudo_targets.agreement(a, a + 1).gt(pseudo_targets.agreement(a, a + 2)).all()


def test_the_ramp_up_rises_to_one():
    assert [pseudo_targets.ramp_up(t) for t in (-9, 0, 0.5, 1, 7)] == [exp(-5), exp(-5), exp(-1.25), 1, 1]


def test_ten_crops_equal_torchvision():
    for side in (20, 21, 23):
        images = uniform(12, 2, 1, side, side + 2)
        assert torch.equal(pseudo_targets.ten_crop(images, 16), torch.stack(torchvision_ten_crop(images, [16, 16])))


def test_running_mean_and_soup_equal_the_mean():
    states = [{"w": normal(i, 2, 3), "seen": torch.tensor(i)} for i in range(5)]
    mean = states[0]
    for count in range(1, 5):
        mean = weight_averaging.running_mean(mean, states[count], count)
    close(mean["w"], torch.stack([s["w"] for s in states]).mean(0))
    assert mean["seen"] == 4
    close(weight_averaging.soup(states)["w"], mean["w"])
    alone = weight_averaging.soup(states[:1])
    alone["w"].zero_()
    assert states[0]["w"].any()


def test_impossible_arguments_raise_with_a_reason():
    first, second = {"w": torch.zeros(2)}, {"w": torch.zeros(3), "v": torch.zeros(1)}
    for wrong, why in (
        (lambda: weight_averaging.wise(first, second, 0.5), "2 weights differ in name or shape, first v"),
        (lambda: weight_averaging.wise(first, first, 1.5), "between 0 and 1"),
        (lambda: weight_averaging.soup([]), "at least one"),
        (lambda: pseudo_targets.kappa_filter(torch.ones(3), 0.5, 0.0), "above 0 and at most 1"),
        (lambda: pseudo_targets.class_thresholds(torch.ones(3, 1), torch.ones(1), 1.1), "above 0 and at most 1"),
        (lambda: pseudo_targets.ten_crop(torch.ones(1, 1, 8, 8), 9), "resize them to 9"),
        (lambda: self_supervised.block_masks(torch.ones(1, 18), 4, (0.5, 0.1)), "smallest and the largest"),
    ):
        with pytest.raises(ValueError, match=why):
            wrong()


def scattered(numbers, side, ratio=(0.1, 0.5), chance=0.5):
    share = ratio[0] + (ratio[1] - ratio[0]) * numbers[:, 1]
    rank = uniform(0, len(numbers), side**2).argsort(1)
    covered = rank < (share * side**2).round()[:, None]
    return (covered & (numbers[:, :1] < chance)).reshape(-1, side, side)


def quarter(numbers, side, ratio=(0.1, 0.5), chance=0.5):
    masks = torch.zeros(len(numbers), side, side, dtype=torch.bool)
    masks[:, : side // 2, : side // 2] = True
    return masks


def no_prior(labels, strength=0.0):
    return labels.nanmean(0)


def of_the_scored_samples(scores, labels, kappa):
    return torch.stack([pseudo_targets.kappa_filter(of, float((of > 0).double().mean()), kappa) for of in scores.T], 1)


def unfilled_counts_as_zero(scores, prevalence, kappa):
    pairs = list(zip(scores.nan_to_num(0.0).T, prevalence, strict=True))
    low = [of.quantile(kappa * (1 - ratio)) for of, ratio in pairs]
    return torch.stack(low), torch.stack([of.quantile(1 - kappa * ratio) for of, ratio in pairs])


def high_rule_wins(scores, low, high):
    return torch.full_like(scores, torch.nan).masked_fill(scores <= low, 0.0).masked_fill(scores >= high, 1.0)


def both_sides_alike(logits, reference, cut):
    distance, seen = (logits - cut).abs(), (reference - cut).abs()
    mean, spread = seen.nanmean(0), seen.nan_to_num(0.0).std(0)
    return (-((distance - mean).clamp(max=0) ** 2) / (2 * spread**2)).exp()


def other_order(images, size):
    return torch.stack(torchvision_ten_crop(images, [size, size]))[[0, 2, 1, 3, 4, 5, 7, 6, 8, 9]]


MUTATIONS = [
    ("test_masks_cover_the_drawn_share_of_the_drawn_images", "objectives.self_supervised.block_masks", quarter),
    ("test_a_mask_depends_only_on_its_numbers", "objectives.self_supervised.block_masks", scattered),
    ("test_a_mask_depends_only_on_its_numbers", "objectives.self_supervised.block_masks", quarter),
    ("test_masks_are_blocks_of_patches", "objectives.self_supervised.block_masks", scattered),
    ("test_masks_are_blocks_of_patches", "objectives.self_supervised.block_masks", quarter),
    ("test_rectangles_have_the_drawn_position_and_shape", "objectives.self_supervised.ASPECT", (0.0, 0.0)),
    ("test_rectangles_have_the_drawn_position_and_shape", "objectives.self_supervised.block_masks", quarter),
    (
        "test_prevalence_of_few_images_shrinks_to_the_overall_rate",
        "objectives.pseudo_targets.shrunk_prevalence",
        no_prior,
    ),
    (
        "test_the_filter_takes_its_ratio_from_other_images",
        "objectives.pseudo_targets.kappa_labels",
        of_the_scored_samples,
    ),
    (
        "test_thresholds_are_quantiles_that_ignore_nan",
        "objectives.pseudo_targets.class_thresholds",
        unfilled_counts_as_zero,
    ),
    (
        "test_ties_become_negative_and_the_middle_is_left_out",
        "objectives.pseudo_targets.hard_labels",
        high_rule_wins,
    ),
    (
        "test_aligned_probabilities_approach_the_prevalence",
        "objectives.pseudo_targets.align",
        lambda logits, mean, prevalence: logits + mean.logit() - prevalence.logit(),
    ),
    (
        "test_aligned_probabilities_approach_the_prevalence",
        "objectives.pseudo_targets.move_mean",
        lambda mean, batch, momentum: mean,
    ),
    ("test_soft_weights_equal_a_plain_loop", "objectives.pseudo_targets.soft_weights", both_sides_alike),
    ("test_a_side_without_reference_has_weight_zero", "objectives.pseudo_targets.soft_weights", both_sides_alike),
    (
        "test_agreement_is_one_for_equal_and_zero_for_opposite_heads",
        "objectives.pseudo_targets.agreement",
        lambda a, b: a.sigmoid() * b.sigmoid() + (-a).sigmoid() * (-b).sigmoid(),
    ),
    ("test_the_ramp_up_rises_to_one", "objectives.pseudo_targets.ramp_up", lambda t: exp(-5 * (1 - t) ** 2)),
    ("test_ten_crops_equal_torchvision", "objectives.pseudo_targets.ten_crop", other_order),
    (
        "test_running_mean_and_soup_equal_the_mean",
        "engine.weight_averaging.running_mean",
        lambda mean, new, count: weight_averaging.wise(mean, new, 0.5),
    ),
    (
        "test_impossible_arguments_raise_with_a_reason",
        "engine.weight_averaging.soup",
        lambda ingredients: next(iter(ingredients)) if ingredients else None,
    ),
]


@pytest.mark.parametrize(("test", "attribute", "wrong"), MUTATIONS)
def test_every_property_notices_its_mutation(monkeypatch, test, attribute, wrong):
    monkeypatch.setattr(f"learner.{attribute}", wrong)
    with pytest.raises((AssertionError, pytest.fail.Exception)):  # the latter where no error is raised
        globals()[test]()


def test_no_property_is_without_a_mutation():
    properties = {name for name in globals() if name.startswith("test_")}
    last = {"test_every_property_notices_its_mutation", "test_no_property_is_without_a_mutation"}
    assert properties - last == {name for name, *_ in MUTATIONS}
