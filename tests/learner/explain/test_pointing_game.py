"""The measures of bench/explain/pointing_game.py on maps and boxes with known answers."""

import csv

import numpy as np
import pytest
from PIL import Image

from bench.common.public_images import read_set
from bench.explain.pointing_game import CENTRE, FLAT, SERVED, USUAL, Case, priors, read_cases, score, summary

GRID = 16


def box(top, left, high, wide):
    region = np.zeros((512, 512), bool)
    region[top : top + high, left : left + wide] = True
    return region


@pytest.fixture
def images(tmp_path):
    """Return a function that writes a set of two images, the first with these boxes, and reads it."""

    def write(boxes):
        for name in ("a.png", "b.png"):
            Image.new("L", (64, 64)).save(tmp_path / name)
        with (tmp_path / "manifest.csv").open("w", newline="") as file:
            rows = [("file", "patient_id", "labels", "boxes"), ("a.png", "p1", "Mass", boxes), ("b.png", "p2", "", "")]
            csv.writer(file).writerows(rows)
        return read_set(tmp_path)

    return write


def test_boxes_of_one_finding_are_one_region_on_the_plate(images):
    mass, nodule = read_cases(images("Mass:0:0:100:200|Nodule:512:512:64:64|Mass:900:900:100:100"))
    assert (mass.image, mass.patient, mass.finding, nodule.finding) == (0, "p1", "Mass", "Nodule")
    assert mass.region.sum() == 50 * 100 + 50 * 50 and mass.region[99, 49] and not mass.region[100, 49]
    assert nodule.region.sum() == 32 * 32 and nodule.region[256, 256]


def test_a_box_outside_the_image_is_named(images):
    with pytest.raises(ValueError, match=r"a\.png: box Mass:1000:0:100:10 leaves the image"):
        read_cases(images("Mass:1000:0:100:10"))


def test_a_map_that_is_the_box_hits_it_and_a_map_beside_it_misses():
    region = box(128, 64, 64, 96)
    exact = region.reshape(GRID, 32, GRID, 32).mean((1, 3))
    seen = score(exact, region)
    assert seen["pointing"] == 1.0 and seen["mass"] > 0.6 and seen["iou"] > 0.7  # the enlarged map has soft edges
    missed = score(np.fliplr(np.flipud(exact)), region)
    assert missed == {"pointing": 0.0, "mass": 0.0, "iou": pytest.approx(0.0, abs=0.02)}
    assert score(np.zeros((GRID, GRID)), region) == {"pointing": 0.0, "mass": 0.0, "iou": 0.0}


def test_a_flat_map_has_the_share_of_the_boxs_area():
    region = box(0, 0, 256, 128)
    seen = score(np.ones((GRID, GRID)), region)
    assert seen["pointing"] == pytest.approx(1 / 8) and seen["mass"] == pytest.approx(1 / 8)
    rows = priors([Case(0, "p", "Mass", region), Case(1, "q", "Mass", region)], GRID)
    assert rows[FLAT][0]["mass"] == pytest.approx(1 / 8)
    assert rows[USUAL][0]["pointing"] == 1.0  # the other patient's box
    assert rows[CENTRE][0]["mass"] < rows[USUAL][0]["mass"]


def test_intervals_draw_patients_not_images():
    patients = [f"p{i // 4}" for i in range(40)]  # ten patients of four equal images
    values = [{"pointing": float(i // 4 % 2), "mass": 0.5, "iou": 0.0} for i in range(40)]
    table = summary({SERVED: values, CENTRE: values}, patients, np.arange(40))
    value, low, high = table[SERVED]["pointing"]
    assert value == 0.5 and high - low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(10), abs=0.1)  # not sqrt(40)
    assert table[SERVED]["minus centre"]["pointing"] == [0.0, 0.0, 0.0]
