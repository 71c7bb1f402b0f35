"""What a card compares the network with: raw pixels, and the model that the round started from."""

import shutil

import numpy as np
import pytest

from learner.__main__ import main
from tests.support.learner.round_folders import FINDINGS, card, make_round, read_manifest, write_manifest


def test_the_card_compares_the_network_with_raw_pixels_on_validation_patients(tmp_path):
    folder = make_round(tmp_path / "r", train=(40, 0), validation=80, calibration=0, t0_epochs=1, epochs=1)
    assert main([str(folder)]) == 0
    rows = {check["finding"]: check for check in card(folder)["floor"]["checks"]}
    for finding in FINDINGS:
        assert rows[finding]["reference"] > 0.95  # a bright square in its place is easy for raw pixels
        assert rows[finding]["candidate"] == pytest.approx(card(folder)["metrics"][finding]["auc"])
        low, high = rows[finding]["ci"]
        assert low <= rows[finding]["observed"] <= high
    assert rows[None]["reference"] == pytest.approx(np.mean([rows[finding]["reference"] for finding in FINDINGS]))


def test_the_card_compares_a_first_round_with_t0_and_a_later_one_with_its_parent_by_view_and_scanner(tmp_path):
    sizes = {"train": (6, 2), "validation": 80, "calibration": 0, "t0_epochs": 1, "epochs": 1}
    first = make_round(tmp_path / "first", **sizes)
    manifest = read_manifest(first)
    for number, sample in enumerate(manifest["images"]):
        sample |= {"view": ("PA", "AP")[number % 10 == 0], "scanner": None}
    write_manifest(first, manifest)
    assert main([str(first)]) == 0
    assert card(first, "t0")["forgetting"] is None
    seen = card(first)["forgetting"]
    assert seen["before"] == "t0"
    rows = {(row["group"], row["value"], row["finding"]): row for row in seen["changes"]}
    for finding in FINDINGS:
        row = rows["all", "", finding]
        assert row["before"] == pytest.approx(card(first, "t0")["metrics"][finding]["auc"], abs=2e-3)
        assert row["after"] == pytest.approx(card(first)["metrics"][finding]["auc"])
        assert row["difference"] == pytest.approx(row["after"] - row["before"])
    assert (rows["view", "AP", None]["images"], rows["view", "AP", None]["note"]) == (8, "not enough data")
    assert rows["scanner", "not known", None]["images"] == 80
    parent = {"bundle": "abc", "state": str(first / "final/state.safetensors")}
    later = make_round(tmp_path / "later", parent=parent, **sizes)  # an older manifest: no view, no scanner
    assert main([str(later)]) == 0
    seen = card(later)["forgetting"]
    (before,) = [row["before"] for row in seen["changes"] if (row["group"], row["finding"]) == ("all", "mass")]
    assert seen["before"] == "abc" and before == pytest.approx(card(first)["metrics"]["mass"]["auc"], abs=2e-3)
    (first / "final/model.onnx").unlink()
    shutil.rmtree(later / "final")
    (later / "result.json").unlink()
    assert main([str(later)]) == 0
    assert card(later)["forgetting"]["line"] == "not measured: final/model.onnx is no longer there"
