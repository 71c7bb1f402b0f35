"""Phantoms: deterministic by seed, findings in the right place, no shortcut reveals a label."""

import numpy as np
import pytest

from dicom.phantom import phantom

SMALL = 96


def change_by(finding: str, strength: float = 1.0, seed: int = 11) -> np.ndarray:
    """Return the absolute difference that a finding makes, float [rows, columns]."""
    plain, sick = phantom.image(seed, {}, size=SMALL), phantom.image(seed, {finding: strength}, size=SMALL)
    return np.abs(sick.astype(float) - plain.astype(float))


def test_an_image_is_twelve_bit_and_the_same_for_the_same_seed():
    first, again = phantom.image(3, {"opacity": 0.5}, size=SMALL), phantom.image(3, {"opacity": 0.5}, size=SMALL)
    assert first.dtype == np.uint16 and first.shape == (SMALL, SMALL)
    assert first.max() <= 4095 and first.std() > 300
    assert np.array_equal(first, again)
    assert not np.array_equal(first, phantom.image(4, {"opacity": 0.5}, size=SMALL))


def test_air_is_dark_and_the_heart_is_bright():
    images = np.mean([phantom.image(seed, {}, size=SMALL) for seed in range(12)], axis=0)
    lungs = (images[45:55, 18:30].mean() + images[45:55, 66:78].mean()) / 2
    heart = images[52:62, 46:56].mean()
    assert heart > lungs + 1000


@pytest.mark.parametrize("finding", phantom.FINDINGS)
def test_a_stronger_finding_changes_more_of_the_image(finding: str):
    weak = np.mean([change_by(finding, 0.2, seed).mean() for seed in range(6)])
    strong = np.mean([change_by(finding, 1.0, seed).mean() for seed in range(6)])
    assert 0 < weak < strong


def test_a_wide_heart_is_wider_on_the_patients_left():
    change = np.mean([change_by("cardiomegaly", 1.0, seed) for seed in range(8)], axis=0)
    assert change[40:75, 52:80].mean() > 3 * change[:30].mean()


def test_an_effusion_lies_low_in_the_chest():
    change = np.mean([change_by("effusion", 1.0, seed) for seed in range(16)], axis=0)
    assert change[45:75].mean() > 20 * change[10:30].mean()


def test_a_longer_draw_begins_with_the_shorter_one():
    long, short = phantom.draw(40, 9), phantom.draw(15, 9)
    assert long[:15] == short
    assert phantom.draw(15, 10) != short


def test_patients_come_back_with_the_same_build_sex_and_age():
    by_patient: dict[str, list[phantom.Phantom]] = {}
    for image in phantom.draw(300, 1):
        by_patient.setdefault(image.patient, []).append(image)
    several = [images for images in by_patient.values() if len(images) > 1]
    assert len(several) > 20
    for images in several:
        assert len({(f.anatomy, f.sex, f.age_years) for f in images}) == 1
        assert [f.number for f in images] == list(range(len(images)))
        assert len({f.seed for f in images}) == len(images)


def test_prevalence_matches_and_only_present_findings_have_a_strength():
    images = phantom.draw(2000, 2, ("cardiomegaly", "opacity"), {"cardiomegaly": 0.5, "opacity": 0.1})
    labels = np.array([[f.labels["cardiomegaly"], f.labels["opacity"]] for f in images])
    assert abs(labels[:, 0].mean() - 0.5) < 0.05 and abs(labels[:, 1].mean() - 0.1) < 0.03
    assert all(set(f.strengths) == {name for name, value in f.labels.items() if value} for f in images)
    ap = np.array([f.view == "AP" for f in images])
    assert abs(labels[ap, 0].mean() - labels[~ap, 0].mean()) < 0.08  # the view does not reveal the label


def test_mean_brightness_does_not_reveal_a_label():
    images = phantom.draw(400, 3, prevalence=0.4, repeat=0.0)
    mean = np.array([f.pixels(size=64).mean() for f in images])
    for finding in phantom.FINDINGS[:3]:
        sick = np.array([f.labels[finding] for f in images], bool)
        auc = (mean[sick][:, None] > mean[~sick][None, :]).mean()
        assert 0.35 < auc < 0.65, (finding, auc)


def test_a_lateral_and_a_hip_differ_from_a_frontal_chest():
    def unit(images: list[np.ndarray]) -> np.ndarray:
        rows = np.array([f.reshape(16, 6, 16, 6).mean((1, 3)).ravel() for f in images])
        rows = rows - rows.mean(axis=1, keepdims=True)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    chest = unit([phantom.image(s, {}, size=SMALL) for s in range(8)])
    usual = (chest[:4] @ chest[4:].T).mean()
    for draw_odd in (phantom.lateral, phantom.hip):
        odd = unit([draw_odd(s, size=SMALL) for s in range(4)])
        assert (chest @ odd.T).max() < usual - 0.1


def test_a_nodule_changes_its_own_spot_and_nothing_else():
    change = change_by("nodule")
    assert 0 < (change > 0).mean() < 0.02


def test_an_unknown_finding_or_view_is_refused_by_name():
    with pytest.raises(ValueError, match="fracture"):
        phantom.draw(3, 0, ("fracture",))
    with pytest.raises(ValueError, match="LL"):
        phantom.image(0, {}, view="LL")
