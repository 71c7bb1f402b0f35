"""Pseudo-labels from the graph, and logistic regression, against scikit-learn, plain loops and closed forms."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from learner.fits import label_propagation, logistic

torch.set_num_threads(1)

NAN = float("nan")


def two_moons(samples=300, seed=0):
    """Return two half circles (N, 2), which no straight line separates, and the circle of each point (N,)."""
    rng = np.random.default_rng(seed)
    angle, side = rng.uniform(0, np.pi, samples), np.arange(samples) % 2
    x = np.where(side, 1 - np.cos(angle), np.cos(angle))
    y = np.where(side, 0.5 - np.sin(angle), np.sin(angle))
    points = np.stack([x, y], 1) + rng.normal(0, 0.05, (samples, 2))
    return torch.from_numpy(points).float(), torch.from_numpy(side)


def few(truth, of_each=3):
    labels = torch.full((len(truth), 1), NAN)
    for value in (0, 1):
        labels[(truth == value).nonzero()[:of_each, 0], 0] = float(value)
    return labels


def test_logistic_regression_equals_scikit_learn():
    rng = np.random.default_rng(1)
    x = rng.normal(0, [1, 5, 0.1], (80, 3)) + np.array([3, 0, 1])
    y = (x @ [1, 0.3, -4] + rng.normal(0, 2, 80) > x.mean(0) @ [1, 0.3, -4]).astype(float)
    penalty = 0.05
    theirs = LogisticRegression(C=1 / (penalty * 80), tol=1e-10, max_iter=2000)
    scaled = StandardScaler().fit_transform(x)
    ours = logistic.fit(torch.from_numpy(x), torch.from_numpy(y)[:, None], penalty)(torch.from_numpy(x))
    np.testing.assert_allclose(ours[:, 0], theirs.fit(scaled, y).decision_function(scaled), atol=1e-5)


def test_soft_targets_and_weights_equal_repeated_images():
    torch.manual_seed(0)
    x, soft = torch.randn(40, 3), torch.rand(40, 1)
    weights = torch.rand(40, 1)
    once = logistic.fit(x, soft, 0.1, weights)
    hard = torch.cat([torch.ones(40, 1), torch.zeros(40, 1)])
    both = logistic.fit(torch.cat([x, x]), hard, 0.1, torch.cat([weights * soft, weights * (1 - soft)]))
    torch.testing.assert_close(once(x), both(x), atol=0.02, rtol=0)  # the starting odds differ, the minimum doesn't


def test_unknown_targets_are_ignored_and_one_class_gives_its_odds():
    torch.manual_seed(0)
    x, y = torch.randn(30, 4), torch.randint(0, 2, (30, 3)).float()
    y[10:, 0], y[:, 1], y[:, 2] = NAN, NAN, 1.0
    some = logistic.fit(x, y, 0.1)
    alone = logistic.fit(torch.cat([x[:10]]), y[:10], 0.1)
    assert torch.isfinite(some(x)).all()
    assert not some.weight[1:].any()
    assert some.bias[2] > 2
    # the same ten images are fitted; only the standardisation is that of all images
    assert np.corrcoef(some(x)[:, 0], alone(x)[:, 0])[0, 1] > 0.98


def test_fewer_images_than_features_can_be_fitted():
    torch.manual_seed(0)
    x, y = torch.randn(12, 100), torch.arange(12)[:, None] % 2.0
    answer = logistic.fit(x, y, 0.01)(x)
    assert ((answer > 0) == (y == 1)).all()


def test_neighbours_equal_scikit_learn():
    torch.manual_seed(0)
    points = torch.randn(500, 8)
    _, where = label_propagation.neighbours(points, 7)
    unit = torch.nn.functional.normalize(points, dim=1).numpy()
    theirs = NearestNeighbors(n_neighbors=8).fit(unit).kneighbors(unit, return_distance=False)[:, 1:]
    assert (np.sort(where.numpy()) == np.sort(theirs)).mean() > 0.999


def test_approximate_neighbours_find_most_of_the_exact_ones(monkeypatch):
    torch.manual_seed(0)
    points = torch.randn(20, 8).repeat_interleave(100, 0) + 0.3 * torch.randn(2000, 8)
    exact = label_propagation.neighbours(points, 10)[1]
    monkeypatch.setattr(label_propagation, "EXACT", 100)
    near, approximate = label_propagation.neighbours(points, 10)
    shared = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(exact, approximate, strict=True)]
    assert np.mean(shared) > 9.5
    assert (near > -1).all()
    assert all(i not in row for i, row in enumerate(approximate.tolist()))


def test_whitened_features_have_variance_one_and_no_correlation():
    torch.manual_seed(0)
    white = label_propagation.whiten(torch.randn(400, 10) @ torch.randn(10, 10), 4)
    torch.testing.assert_close(white.T @ white / 400, torch.eye(4), atol=1e-4, rtol=0)


def test_the_graph_is_symmetric_and_its_largest_eigenvalue_is_one():
    points, _ = two_moons(100)
    matrix = label_propagation.affinity(*label_propagation.neighbours(points, 5)).to_dense()
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).max() == pytest.approx(1, abs=1e-4)


def test_propagation_equals_the_closed_form():
    points, truth = two_moons(60)
    matrix = label_propagation.affinity(*label_propagation.neighbours(points, 5))
    labels = few(truth)
    ours = label_propagation.propagate(matrix, labels, damping=0.5, iterations=60)  # .5^60 is negligible
    seeds = torch.stack([(labels[:, 0] == v).float() / 3 for v in (1, 0)], 1)
    mass = torch.linalg.solve(torch.eye(60) - 0.5 * matrix.to_dense(), 0.5 * seeds)
    mass = mass.clamp(min=1e-12).log()
    torch.testing.assert_close(ours[:, 0], mass[:, 0] - mass[:, 1], atol=1e-3, rtol=1e-3)


def test_propagation_separates_what_a_linear_head_cannot():
    points, truth = two_moons()
    labels = few(truth)
    near, where = label_propagation.neighbours(torch.cat([points, torch.ones(300, 1)], 1), 8)
    scores = label_propagation.propagate(label_propagation.affinity(near, where), labels)[:, 0]
    straight = logistic.fit(points, labels, 0.01)(points)[:, 0]
    right = lambda s: ((s > 0) == (truth == 1)).float().mean()  # noqa: E731
    assert right(scores) > right(straight) + 0.05


def test_targets_follow_the_rank_and_the_prevalence_and_keep_known_labels():
    points, truth = two_moons()
    labels = few(truth)
    soft = label_propagation.pseudo_labels(torch.cat([points, points**2], 1), labels, torch.tensor([0.2]), 8, 4)
    known = ~labels.isnan()
    assert torch.equal(soft[known], labels[known])
    assert (soft[~known] > 0.5).float().mean() == pytest.approx(0.2, abs=0.03)


def test_a_finding_with_labels_of_one_class_has_no_target():
    points, truth = two_moons(50)
    labels = torch.cat([few(truth), torch.full((50, 1), NAN)], 1)
    labels[0, 1] = 1.0
    soft = label_propagation.pseudo_labels(points, labels, torch.tensor([0.5, 0.1]), 5, 2)
    assert not soft[:, 0].isnan().any()
    assert soft[1:, 1].isnan().all()


MUTATIONS = [
    (
        test_propagation_separates_what_a_linear_head_cannot,
        "propagate",
        lambda g, labels, **_: labels.nan_to_num(0.5) - 0.5,
    ),
    (
        test_targets_follow_the_rank_and_the_prevalence_and_keep_known_labels,
        "soft_targets_by_rank",
        lambda s, p, *_: s.sigmoid(),
    ),
    (test_whitened_features_have_variance_one_and_no_correlation, "whiten", lambda x, c: x[:, :c]),
    (
        test_the_graph_is_symmetric_and_its_largest_eigenvalue_is_one,
        "affinity",
        lambda near, where: torch.rand(100, 100),
    ),
]


@pytest.mark.parametrize(("test", "name", "wrong"), MUTATIONS)
def test_every_property_notices_its_mutation(monkeypatch, test, name, wrong):
    monkeypatch.setattr(label_propagation, name, wrong)
    with pytest.raises(AssertionError):
        test()
