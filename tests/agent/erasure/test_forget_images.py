"""Which images `forget` removes: corrected, with an issuer, being taken in, golden, and received later."""

import threading

import pytest

from agent.erasure import forget
from agent.errors import Problem
from agent.images import intake, labels
from agent.ledger.database import utc
from agent.rounds import golden_set
from agent.service.status import status
from tests.conftest import make_site
from tests.support.agent.crash_line import write_labels
from tests.support.agent.images import InProcessExaminer, put, take_in, xray
from tests.support.agent.patient import (
    BY_AND_REASON,
    FILE,
    PATIENT,
    make_patient_site,
    patient_image,
    pseudonym,
    traces,
)


@pytest.fixture
def site(tmp_path):
    return make_patient_site(tmp_path / "site")


def test_free_pages_of_the_database_hold_no_trace(site):
    """Many rows, so that pages become free, and an SQLite that does not overwrite deleted data."""
    key = pseudonym(site)
    with site.ledger() as ledger:
        ledger.db.execute("PRAGMA secure_delete = OFF")
        with ledger.transaction():
            for n in range(300):
                ledger.insert(
                    "image", sha256=f"{n:064x}", state="stored", sop_uid=f"1.2.77777.{n}", study_uid="1.2.88888.1", patient_key=key,
                    file=FILE, received_at="", stored_at="", original=f"originals/00/{n:064x}.dcm", plate=f"plates/00/{n:064x}.npy",
                )  # fmt: skip
        assert forget.forget(site, ledger, [key], *BY_AND_REASON, refuse=False)["state"] == "done"
    assert traces(site, [b"1.2.77777", b"1.2.88888", FILE.encode(), key.encode(), b"originals/00"]) == []


def test_forget_also_takes_the_superseded_version_with_the_wrong_patient(site):
    wrong, right = xray(1, patient="SOMEBODY-ELSE"), patient_image(1)
    right.SOPInstanceUID = right.file_meta.MediaStorageSOPInstanceUID = wrong.SOPInstanceUID
    with site.ledger() as ledger:
        for ds in (wrong, right):
            put(site, ds)
            take_in(site, ledger)
        assert forget.forget(site, ledger, [pseudonym(site)], *BY_AND_REASON, refuse=False)["images"] == 2
        assert ledger.value("SELECT count(*) FROM image WHERE reason = 'forgotten'") == 2


def test_an_id_with_an_issuer_needs_the_option_issuer(site):
    ds = patient_image(1)
    ds.IssuerOfPatientID = "WEST"
    put(site, ds)
    with site.ledger() as ledger:
        take_in(site, ledger)
        with pytest.raises(Problem, match="--issuer"):
            forget.forget(site, ledger, forget.pseudonyms_of(site, PATIENT, ()), *BY_AND_REASON, refuse=False)
        assert (
            forget.forget(site, ledger, forget.pseudonyms_of(site, PATIENT, ["WEST"]), *BY_AND_REASON, refuse=False)[
                "images"
            ]
            == 1
        )


def test_a_placeholder_id_and_a_malformed_pseudonym_are_reported(site):
    with pytest.raises(Problem, match="a placeholder"):
        forget.pseudonyms_of(site, " unknown ", ())
    with pytest.raises(Problem, match="16 hex"):
        forget.checked_key("HN-0815")


def test_a_later_image_is_taken_in_again_unless_the_patient_is_refused(site):
    for refuse, stored in ((False, 1), (True, 0)):
        with site.ledger() as ledger:
            put(site, patient_image(1))
            take_in(site, ledger)
            forget.forget(site, ledger, [pseudonym(site)], *BY_AND_REASON, refuse=refuse)
            put(site, patient_image(2))
            take_in(site, ledger)
            assert ledger.value("SELECT count(*) FROM image WHERE patient_key IS NOT NULL") == stored
            assert site.inbox.waiting() == []
    assert (
        traces(site, [PATIENT.encode(), pseudonym(site).encode(), str(patient_image(2).SOPInstanceUID).encode()]) == []
    )
    with site.ledger() as ledger:
        assert ledger.value("SELECT outcome FROM receipt WHERE image IS NULL") == "rejected"
        put(site, xray(3))
        take_in(site, ledger)
        assert ledger.value("SELECT count(*) FROM image WHERE patient_key IS NOT NULL") == 1


def test_a_frozen_golden_set_reports_its_losses_and_freezing_makes_a_new_version(tmp_path):
    site = make_site(
        tmp_path / "site", patients={"golden": 0.9, "golden_next": 0.0, "calibration": 0.0, "validation": 0.0}
    )
    with site.ledger() as ledger:
        put(site, patient_image(1))
        for seed in range(2, 12):
            put(site, xray(seed), f"{seed}.dcm")
        take_in(site, ledger)
        rows = ledger.rows("SELECT * FROM image WHERE range = 'golden'")
        write_labels(tmp_path / "l.csv", [(row["sop_uid"], "effusion", n % 2) for n, row in enumerate(rows)])
        labels.import_csv(site, ledger, tmp_path / "l.csv", "test")
        before = golden_set.freeze(site, ledger, "test")
        key = next(row["patient_key"] for row in rows)
        result = forget.forget(site, ledger, [key], *BY_AND_REASON, refuse=False)
        assert result["state"] == "done"
        assert result["golden"] == [{"version": 1, "images": 1}]
        shown = golden_set.show(site, ledger)
        assert (shown["version"], shown["lost"], shown["images"]) == (1, 1, before["images"] - 1)
        assert shown["sha256"] == before["sha256"]
        assert "golden set" in {alert["kind"] for alert in status(site, ledger)["alerts"]}
        again = golden_set.freeze(site, ledger, "test")
        assert (again["version"], again["lost"], again["images"]) == (2, 0, before["images"] - 1)
        assert "golden set" not in {alert["kind"] for alert in status(site, ledger)["alerts"]}


def test_images_that_are_being_taken_in_are_forgotten_too(site):
    """The intake runs while the patient is forgotten: in the end no image of the inbox is left."""
    with site.ledger() as ledger:
        put(site, patient_image(0))
        take_in(site, ledger)
    for seed in range(1, 41):
        put(site, patient_image(seed) if seed % 2 else xray(seed), f"{seed}.dcm")
    stop, errors = threading.Event(), []

    def take() -> None:
        with site.ledger() as mine:
            while not stop.is_set() or site.inbox.waiting():
                try:
                    intake.step(site, mine, InProcessExaminer(site))  # type: ignore[arg-type]
                except FileNotFoundError:  # forgotten during the step; the agent's loop continues too
                    continue
                except BaseException as error:
                    errors.append(error)
                    return

    worker = threading.Thread(target=take, daemon=True)
    worker.start()
    with site.ledger() as ledger:
        try:
            result = forget.forget(site, ledger, [pseudonym(site)], *BY_AND_REASON, refuse=False)
        finally:
            stop.set()
            worker.join()
        assert errors == []
        assert result["state"] == "done"
        assert ledger.value("SELECT count(*) FROM image WHERE patient_key IS NOT NULL") == 20
    assert traces(site, [PATIENT.encode(), pseudonym(site).encode()]) == []


def test_a_late_score_or_label_of_a_forgotten_image_is_dropped(site):
    with site.ledger() as ledger:
        put(site, patient_image(1))
        take_in(site, ledger)
        forget.forget(site, ledger, [pseudonym(site)], *BY_AND_REASON, refuse=False)
        with ledger.transaction():
            ledger.insert("prediction", image=1, bundle="b", probabilities="{}", at=utc())
            ledger.insert("label", image=1, finding="effusion", value=1, source="report", by="x", at=utc())
        assert ledger.value("SELECT count(*) FROM prediction") == ledger.value("SELECT count(*) FROM label") == 0
