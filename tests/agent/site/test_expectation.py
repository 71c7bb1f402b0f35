"""`init` says what a first model can be expected to do; its figures are those of the committed study."""

import json
from pathlib import Path

import pytest

from agent.site.expectation import BACKBONE, FIRST_MODEL, NO_BACKBONE, RAW_PIXELS, expectation

STUDY = Path(__file__).resolve().parents[3] / "bench/results/features_study.json"
ROWS = {
    RAW_PIXELS: "pixels",
    NO_BACKBONE: "simple features alone (no backbone)",
    BACKBONE: "blend, fitted shares (default)",
}


@pytest.mark.parametrize("count", FIRST_MODEL)
def test_the_figures_are_those_of_the_study(count):
    measured = json.loads(STUDY.read_text())["tables"][str(count)]
    for name, row in ROWS.items():
        assert FIRST_MODEL[count][name] == pytest.approx(measured[row]["abnormal"], abs=0.005)


def test_the_line_depends_on_the_backbone():
    assert "80 and 160 labelled images" in expectation("random")
    assert "random weights" in expectation("random")
    assert "0.82, 0.84 and 0.85" in expectation("/weights/vit.safetensors")
