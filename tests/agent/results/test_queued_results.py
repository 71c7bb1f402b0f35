"""Which images get results, and which again: heartbeats, superseded and forgotten images, `images rerun`."""

import io
import sqlite3

import numpy as np
import pytest

from agent.errors import Problem
from agent.ledger import audit
from agent.ledger.states import FORGOTTEN
from agent.results import heatmap, outbox, reporting
from agent.results.rerun import rerun
from dicom.dataset.facts import COMPREHENSIVE_SR, HEARTBEAT_ID
from tests.conftest import make_site
from tests.support.agent.appliance import Appliance
from tests.support.agent.images import put, take_in, xray
from tests.support.agent.models import FINDINGS, InProcessServer, add_model
from tests.support.agent.reporting_site import NOW, make_reporting_site, outbox_states, score_all, scored_images
from tests.support.dicom.storage_scp import Archive
from tests.support.ports import free_port


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def site(tmp_path, port):
    return make_reporting_site(tmp_path / "site", port)


def test_a_score_and_its_results_are_written_together_or_not_at_all(site):
    with site.ledger() as ledger:
        ledger.db.execute(
            "CREATE TRIGGER broken BEFORE INSERT ON outbox BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
        )
        with pytest.raises(sqlite3.IntegrityError):
            score_all(site, ledger)
        assert ledger.value("SELECT count(*) FROM prediction") == 0
        ledger.db.execute("DROP TRIGGER broken")
        score_all(site, ledger)
        assert (ledger.value("SELECT count(*) FROM prediction"), outbox.state(ledger)["waiting"]) == (1, 2)


def test_heartbeats_rejected_images_and_superseded_versions_get_no_results(site, port):
    old = xray(50, patient="WRONG")
    same = {"sop_uid": old.SOPInstanceUID, "study_uid": old.StudyInstanceUID}
    with scored_images(site) as (ledger, link):
        put(site, xray(51, patient=HEARTBEAT_ID), "heartbeat.dcm")
        put(site, xray(52, view="LL"), "lateral.dcm")
        put(site, old, "old.dcm")
        take_in(site, ledger)
        score_all(site, ledger)
        assert outbox.state(ledger)["waiting"] == 4  # the first image's and the wrong name's
        put(site, xray(50, patient="RIGHT", **same), "right.dcm")
        take_in(site, ledger)
        score_all(site, ledger)
        assert outbox.state(ledger)["waiting"] == 4  # the first image's and the right name's
        with Archive(port) as pacs:
            reporting.send_due(site, ledger, link, NOW)
            assert "WRONG" not in {ds.PatientID for ds in pacs.held.values()}
            assert len(pacs.held) == 4


def test_an_image_corrected_before_its_score_gets_results_under_the_new_header_only(site):
    old = xray(60, patient="WRONG")
    new = xray(60, patient="RIGHT", sop_uid=old.SOPInstanceUID, study_uid=old.StudyInstanceUID)
    with site.ledger() as ledger:
        for version in (old, new):
            put(site, version)
            take_in(site, ledger)
        score_all(site, ledger)
        superseded = ledger.value("SELECT id FROM image WHERE superseded_by IS NOT NULL")
        assert superseded not in {row["image"] for row in ledger.rows("SELECT image FROM outbox")}
        assert outbox.state(ledger)["waiting"] == 4


def test_a_forgotten_image_leaves_nothing_in_the_outbox(site):
    with scored_images(site) as (ledger, _):
        with ledger.transaction():
            ledger.run("UPDATE image SET reason = ? WHERE id = 1", FORGOTTEN)
        assert outbox_states(ledger) == []
        assert outbox.state(ledger) == {"waiting": 0, "failed": 0, "oldest": None}


def test_a_result_that_is_queued_again_waits_from_that_moment(site, port):
    with scored_images(site) as (ledger, link), Archive(port):
        reporting.send_due(site, ledger, link, NOW)
        with ledger.transaction():
            ledger.run("UPDATE outbox SET at = '2000-01-01T00:00:00.000Z'")
            ledger.run("UPDATE outbox SET state = 'failed' WHERE kind = 'sr'")
        rerun(ledger, "1", None, False, "test")
        score_all(site, ledger)
        assert outbox.state(ledger)["waiting"] == 2
        assert outbox.state(ledger)["oldest"] > "2020"


def test_nothing_is_queued_while_results_are_off_and_rerun_queues_it_later(tmp_path, port):
    off = make_site(tmp_path / "off", site={"findings": list(FINDINGS)})
    with off.ledger() as ledger:
        put(off, xray(0))
        take_in(off, ledger)
        add_model(off, ledger, 1)
        score_all(off, ledger)
        assert outbox_states(ledger) == []
    keys = off.config.results.model_copy(update={"sr": True, "destination": f"PACS@127.0.0.1:{port}"})
    on = type(off)(off.root, off.config.model_copy(update={"results": keys}))
    with on.ledger() as ledger, Archive(port) as pacs:
        score_all(on, ledger)
        assert outbox_states(ledger) == []  # only images scored from now on; older ones by rerun
        assert rerun(ledger, None, "predicted", False, "test") == {"images": 1, "results": 0}
        score_all(on, ledger)
        reporting.send_due(on, ledger, reporting.PacsLink(), NOW)
        assert [ds.SOPClassUID for ds in pacs.held.values()] == [COMPREHENSIVE_SR]
        assert ledger.value("SELECT count(*) FROM prediction") == 1  # one model, one score


def test_rerun_after_a_new_model_sends_its_results_beside_the_old_ones(site, port):
    with scored_images(site) as (ledger, link), Archive(port) as pacs:
        reporting.send_due(site, ledger, link, NOW)
        with ledger.transaction():
            ledger.run("UPDATE bundle SET state = 'retired'")
            ledger.run("UPDATE bundle SET is_baseline = 0")
        add_model(site, ledger, 2)
        rerun(ledger, "1", None, False, "test")
        score_all(site, ledger)
        reporting.send_due(site, ledger, link, NOW)
        assert len(pacs.held) == 4
        assert ledger.value("SELECT count(*) FROM prediction") == 2


def test_rerun_reports_wrong_arguments_and_unscorable_images(site):
    with scored_images(site) as (ledger, _):
        put(site, xray(9, view="LL"), "lateral.dcm")
        take_in(site, ledger)
        lateral = ledger.row("SELECT * FROM image WHERE state = 'rejected'")
        for arguments, why in [
            ((None, None, False), "one of UID"),
            (("1", "predicted", False), "one of UID"),
            (("1.2.3", None, False), "no image"),
            ((lateral["sop_uid"], None, False), "rejected, so it is never scored"),
            ((None, "rejected", False), "scored again in one of"),
        ]:
            with pytest.raises(Problem, match=why):
                rerun(ledger, *arguments, "test")


def test_new_images_are_scored_before_those_to_be_scored_again(site):
    with scored_images(site) as (ledger, _):
        rerun(ledger, "1", None, False, "test")
        put(site, xray(77))
        take_in(site, ledger)
        reporting.score_waiting(site, ledger, InProcessServer(site, ledger))  # type: ignore[arg-type]
        assert ledger.value("SELECT max(image) FROM prediction") == 2
        assert ledger.value("SELECT count(*) FROM score_again") == 1


def test_a_packed_heatmap_keeps_evidence_for_a_finding_and_drops_evidence_against_it():
    heat = np.array([[[-5.0, 0.0], [1.0, 2.0]], [[-1.0, -2.0], [-3.0, -4.0]], [[np.nan, 1.0], [1.0, 1.0]]], np.float32)
    packed = np.load(io.BytesIO(heatmap.pack(heat)))
    assert packed.tolist() == [[[0, 0], [128, 255]], [[0, 0], [0, 0]], [[0, 255], [255, 255]]]


def test_the_rerun_command_reports_its_counts_and_writes_the_audit(site):
    with scored_images(site) as (ledger, _), ledger.transaction():
        ledger.run("UPDATE outbox SET state = 'failed', why = 'status C000' WHERE kind = 'sr'")
    appliance = Appliance(site)
    assert appliance.ask("images", "rerun", "--failed", "--by", "Dr. B") == {"images": 0, "results": 1}
    assert appliance.ask("images", "rerun", "1", "--by", "Dr. A") == {"images": 1, "results": 0}
    assert "give one of UID, --state or --failed" in appliance.ask("images", "rerun", code=1)
    with site.ledger() as ledger:
        assert [entry["who"] for entry in audit.tail(ledger, 2)] == ["Dr. B", "Dr. A"]
