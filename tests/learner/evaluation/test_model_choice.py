"""Which candidate a round keeps: the least change that validation patients can't tell from the best."""

import numpy as np
import pytest

from learner.evaluation import model_choice
from learner.evaluation.auc import auc

TRUTH = np.r_[np.ones(20), np.zeros(20)][:, None]
PATIENTS = [f"p{i}" for i in range(40)]


def scores(swapped: int) -> np.ndarray:
    """Separates the classes but for `swapped` images of each, which lie on the other side."""
    logits = np.linspace(2, 1, 40)[:, None] * (2 * TRUTH - 1)
    logits[:swapped] *= -1
    logits[20 : 20 + swapped] *= -1
    return logits


def test_a_difference_within_its_error_keeps_the_first_named():
    better = scores(3)
    better[0] = np.sort(better[20:, 0])[8]  # one image with the finding, less far on the wrong side
    first, second = (model_choice.macro_curve(s, TRUTH, PATIENTS) for s in (scores(3), better))
    assert 0 < second.value - first.value <= model_choice.error(first, second)
    assert model_choice.first_as_good([first, second]) == 0


def test_a_difference_beyond_its_error_wins_over_the_order():
    bad, good = (model_choice.macro_curve(scores(n), TRUTH, PATIENTS) for n in (9, 1))
    assert model_choice.first_as_good([bad, good]) == 1
    assert model_choice.first_as_good([good, bad]) == 0


def test_the_error_is_that_of_the_paired_difference():
    clear = model_choice.macro_curve(scores(3), TRUTH, PATIENTS)
    assert model_choice.error(clear, clear) == 0
    rng = np.random.default_rng(0)
    blurred = scores(3) + rng.normal(0, 2, (40, 1))
    error = model_choice.error(clear, model_choice.macro_curve(blurred, TRUTH, PATIENTS))
    drawn = []
    for _ in range(1000):
        rows = np.r_[rng.integers(0, 20, 20), rng.integers(20, 40, 20)]
        drawn.append(auc(scores(3)[rows, 0], TRUTH[rows, 0]) - auc(blurred[rows, 0], TRUTH[rows, 0]))
    assert error == pytest.approx(np.std(drawn), rel=0.15)  # the bootstrap's


@pytest.mark.parametrize(("positives", "patients"), [(4, 40), (20, 2)])
def test_too_few_images_or_patients_of_a_class_choose_nothing(positives, patients):
    truth = TRUTH.copy()
    truth[positives:20] = np.nan
    who = [f"p{min(i // 20, patients - 1) if patients == 2 else i}" for i in range(40)]
    assert model_choice.macro_curve(scores(1), truth, who) is None


def test_unknown_labels_are_left_out():
    truth = TRUTH.copy()
    truth[0] = np.nan
    assert (
        model_choice.macro_curve(scores(1), truth, PATIENTS).value
        > model_choice.macro_curve(scores(1), TRUTH, PATIENTS).value
    )
