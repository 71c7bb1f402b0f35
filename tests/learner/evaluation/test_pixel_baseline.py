"""The raw-pixel floor against sklearn, and what it does with labels nobody knows."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dicom.phantom import phantom
from learner.evaluation import pixel_baseline
from learner.evaluation.gate import auc


def samples(n: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) * rng.uniform(0.5, 3, d) + rng.uniform(-5, 5, d)
    y = (x @ rng.standard_normal(d) * 0.3 + rng.standard_normal(n) > x.mean()).astype(float)
    return x, y


@pytest.mark.parametrize(("n", "d"), [(300, 20), (30, 80)])
@pytest.mark.parametrize("penalty", [1.0, 100.0])
def test_the_fit_is_sklearns(n, d, penalty):
    x, y = samples(n, d)
    ours = pixel_baseline.fit(x, y[:, None], penalty)
    standard = (x - x.mean(axis=0)) / x.std(axis=0)
    theirs = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=5000).fit(standard, y)
    assert ours.weights[:, 0] == pytest.approx(theirs.coef_[0], abs=1e-4)
    assert ours.scores(x)[:, 0] == pytest.approx(theirs.predict_proba(standard)[:, 1], abs=1e-4)


def test_the_penalty_of_the_floor_is_sklearns_c_of_a_hundredth():
    x, y = samples(120, 40, seed=1)
    standard = (x - x.mean(axis=0)) / x.std(axis=0)
    theirs = LogisticRegression(C=0.01, tol=1e-10, max_iter=5000).fit(standard, y)
    assert pixel_baseline.fit(x, y[:, None]).scores(x)[:, 0] == pytest.approx(
        theirs.predict_proba(standard)[:, 1], abs=1e-5
    )


def test_unknown_labels_are_left_out_of_the_finding_they_belong_to():
    x, y = samples(200, 10)
    gaps = np.stack([y, y], axis=1)
    gaps[50:, 1] = np.nan
    both = pixel_baseline.fit(x, gaps)
    alone = pixel_baseline._newton((x[:50] - both.mean) / both.scale, y[:50], pixel_baseline.PENALTY)
    assert both.weights[:, 1] == pytest.approx(alone[0])
    assert both.weights[:, 0] == pytest.approx(pixel_baseline.fit(x, y[:, None]).weights[:, 0])


def test_a_finding_with_one_class_or_none_gets_a_constant():
    x, _ = samples(40, 10)
    labels = np.stack([np.ones(40), np.zeros(40), np.full(40, np.nan)], axis=1)
    scores = pixel_baseline.fit(x, labels).scores(x)
    assert np.ptp(scores, axis=0).max() == 0
    assert scores[0, 0] > 0.95 and scores[0, 1] < 0.05 and scores[0, 2] == pytest.approx(0.5)


def test_thumbnails_are_area_means():
    plate = np.arange(48 * 72, dtype=np.uint16).reshape(1, 48, 72) % 251
    expected = plate.astype(float).reshape(24, 2, 24, 3).mean(axis=(1, 3)).ravel()
    assert pixel_baseline.thumbnails(plate.astype(np.uint8))[0] == pytest.approx(expected)
    uneven = pixel_baseline.thumbnails(np.full((2, 512, 512), 200, np.uint8))  # 512 is no multiple of 24
    assert uneven.shape == (2, 576) and np.all(uneven == 200)
    with pytest.raises(ValueError, match="24"):
        pixel_baseline.thumbnails(np.zeros((1, 20, 20), np.uint8))


def test_a_dead_pixel_divides_nothing_by_zero():
    x, y = samples(60, 5)
    x[:, 2] = 7.0
    assert np.isfinite(pixel_baseline.fit(x, y[:, None]).scores(x)).all()


def test_the_floor_reads_a_wide_heart_but_not_a_nodule():
    drawn = phantom.draw(360, 4, ("cardiomegaly", "nodule"), 0.4, repeat=0.0)
    small = pixel_baseline.thumbnails(np.array([(p.pixels(size=96) >> 4).astype(np.uint8) for p in drawn]))
    labels = np.array([[p.labels["cardiomegaly"], p.labels["nodule"]] for p in drawn], float)
    scores = pixel_baseline.fit(small[:200], labels[:200]).scores(small[200:])
    assert auc(scores[:, 0], labels[200:, 0]) > 0.8
    assert auc(scores[:, 1], labels[200:, 1]) < 0.65
