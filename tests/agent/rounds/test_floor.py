"""Raw pixels beside a candidate: rows of the stored verdict, the alert, and what people read."""

import numpy as np
import pytest

from agent.images import labels
from agent.rounds import evaluation, golden_set, inspection, records
from agent.service.status import status
from dicom.phantom.wrap import wrap
from tests.conftest import make_site
from tests.support.agent.appliance import Appliance
from tests.support.agent.crash_line import write_labels
from tests.support.agent.images import put, take_in
from tests.support.agent.models import FINDINGS, add_model

IMAGES = 170


def striped(seed: int, positive: bool) -> np.ndarray:
    """uint8 [96, 96]: noise in stripes, left brighter in each pair for positives; the model's 4 x 4 means can't see that."""
    coarse = np.random.default_rng(seed).integers(60, 195, (8, 8)).astype(int)
    coarse += np.where(np.arange(8) % 2 == (0 if positive else 1), 20, -20)
    return np.kron(coarse, np.ones((12, 12), int)).astype(np.uint8)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A site whose finding effusion is easy for raw pixels, and a candidate that was evaluated there."""
    folder = tmp_path_factory.mktemp("floor")
    site = make_site(
        folder / "site",
        site={"findings": list(FINDINGS)},
        patients={"golden": 0.6, "golden_next": 0.0, "calibration": 0.0, "validation": 0.0},
        gate={"min_class": 2, "evaluations_per_year": 4, "require_better": False},
    )
    with site.ledger() as ledger:
        uids = []
        for seed in range(IMAGES):
            dataset = wrap(striped(seed, seed % 2 == 1), patient_id=f"P{seed:04d}", view="PA")
            uids.append(dataset.SOPInstanceUID)
            put(site, dataset, f"{seed}.dcm")
        take_in(site, ledger)
        rows = [(uid, "effusion", n % 2) for n, uid in enumerate(uids)] + [(uid, "nodule", 1) for uid in uids[:4]]
        write_labels(folder / "labels.csv", rows)
        labels.import_csv(site, ledger, folder / "labels.csv", "test")
        golden_set.freeze(site, ledger, "test")
        add_model(site, ledger, 1)
        candidate = add_model(site, ledger, 2)
        before = status(site, ledger)["alerts"]
        verdict = evaluation.evaluate(site, ledger, candidate["bundle"])["verdict"]
        yield site, ledger, candidate, before, verdict


def test_the_stored_verdict_has_a_row_for_each_finding_and_for_the_macro_auc(judged):
    site, ledger, candidate, _, verdict = judged
    stored = inspection.verdict(site, ledger, records.get(ledger, candidate["round"]))
    rows = {check["finding"]: check for check in stored["checks"] if check["name"] == "vs raw pixels"}
    assert list(rows) == [None, *FINDINGS]
    assert rows["effusion"]["reference"] > 0.9  # fitted on the train range, scored on the golden range
    assert rows["effusion"]["outcome"] == "worse" and rows["effusion"]["ci"][1] < 0
    assert rows["nodule"]["note"] == "no labelled train images of both classes"
    assert rows[None]["observed"] == rows["effusion"]["observed"]
    assert "; worse than raw pixels: macro AUC " in verdict["line"]


def test_the_floor_learns_from_no_golden_label(judged, monkeypatch):
    site, ledger, *_ = judged
    _, plates = golden_set.load(site, ledger, 1)
    read = []
    kept = site.store.plate
    monkeypatch.setattr(type(site.store), "plate", lambda self, plate: read.append(plate) or kept(plate))
    evaluation.floor.score(site, ledger, plates)
    train = {row["plate"] for row in ledger.rows("SELECT plate FROM image WHERE range = 'train'")}
    assert set(read[: len(train)]) == train and read[len(train) :] == plates


def test_a_candidate_below_raw_pixels_is_an_alert_and_degrades_nothing(judged):
    site, ledger, candidate, before, _ = judged
    assert not [alert for alert in before if alert["kind"] == "raw pixels"]
    (alert,) = [alert for alert in status(site, ledger)["alerts"] if alert["kind"] == "raw pixels"]
    assert alert["detail"].startswith(f"{candidate['bundle']} ({candidate['round']}): macro AUC 0.")
    assert "effusion AUC 0." in alert["detail"]


def test_verdict_and_round_show_print_the_comparison(judged):
    site, _, candidate, *_ = judged
    appliance = Appliance(site)
    printed = appliance.run("verdict", candidate["round"]).stdout
    assert "vs raw pixels" in printed and "no requirement; 95 % interval" in printed
    assert "worse than raw pixels: macro AUC" in appliance.run("round", "show", candidate["round"]).stdout
