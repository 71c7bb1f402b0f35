"""Sending results: each arrives once despite failures, and a refused result stays an alert until it is sent again."""

import random
import re
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from agent.images import listing
from agent.results import outbox, reporting
from agent.results.rerun import rerun
from agent.service import status
from dicom.client.sender import Sent
from dicom.dataset.facts import RESULT_UID_ROOT
from dicom.node import tls
from tests.conftest import make_site
from tests.support.agent.images import put, take_in, xray
from tests.support.agent.models import FINDINGS, add_model
from tests.support.agent.reporting_site import NOW, make_reporting_site, outbox_states, score_all, scored_images
from tests.support.dicom.certificates import authority
from tests.support.dicom.storage_scp import Archive, text_of
from tests.support.ports import free_port


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def site(tmp_path, port):
    return make_reporting_site(tmp_path / "site", port)


def test_results_are_queued_with_the_score_and_arrive_over_one_association(site, port):
    with scored_images(site, images=3) as (ledger, link), Archive(port) as pacs:
        assert outbox_states(ledger) == [("sr", "waiting"), ("sc", "waiting")] * 3
        assert reporting.send_due(site, ledger, link, NOW) == 6
        assert reporting.send_due(site, ledger, link, NOW) == 0
        assert (len(pacs.held), len(pacs.arrivals), pacs.associations) == (6, 6, 1)
        assert {ds.Modality for ds in pacs.held.values()} == {"SR", "OT"}
        assert all(uid.startswith(RESULT_UID_ROOT) for uid in pacs.held)
        studies_there = {ds.StudyInstanceUID for ds in pacs.held.values()}
        assert studies_there == {row["study_uid"] for row in ledger.rows("SELECT study_uid FROM image")}
        assert ledger.value("SELECT count(*) FROM outbox WHERE heatmap IS NOT NULL") == 0


def test_sent_objects_hold_the_scores_of_the_ledger(site, port):
    with scored_images(site) as (ledger, link), Archive(port) as pacs:
        reporting.send_due(site, ledger, link, NOW)
        row = listing.newest(site, ledger, None, 1)[0]
        report = next(ds for ds in pacs.held.values() if ds.Modality == "SR")
        text = " ".join(text_of(report))
        assert f"bundle {row['bundle']}" in text
        for finding, probability in row["predictions"].items():
            assert f"{finding} {probability:.4f}" in text
        capture = next(ds for ds in pacs.held.values() if ds.Modality == "OT")
        assert capture.pixel_array[:512, :512].std() > 1
        assert row["bundle"] in capture.ImageComments


def test_after_an_hour_without_pacs_everything_arrives_once_and_retries_grow_rarer(site, port):
    with scored_images(site, images=3) as (ledger, link):
        tries, now = [], NOW
        while now < NOW + timedelta(hours=1):
            tries.append(now)
            assert reporting.send_due(site, ledger, link, now) == 0
            assert link.paused_until is not None
            assert (
                reporting.send_due(site, ledger, link, link.paused_until - timedelta(seconds=0.001)) == 0
            )  # not even tried
            now = link.paused_until
        gaps = [(b - a).total_seconds() for a, b in pairwise(tries)]
        assert gaps[0] <= 2
        assert 150 <= max(gaps) <= reporting.LONGEST_S
        assert len(tries) < 40
        assert outbox.state(ledger)["waiting"] == 6
        with Archive(port) as pacs:
            assert reporting.send_due(site, ledger, link, now) == 6
            assert link.failures == 0  # the next outage begins with short waits again
            assert sorted(pacs.arrivals) == sorted(pacs.held)
            assert len(pacs.held) == 6


def test_the_back_off_is_random_so_that_appliances_do_not_call_at_the_same_moment():
    waits = [reporting.back_off(20, random.Random(seed)).total_seconds() for seed in range(50)]
    assert reporting.LONGEST_S / 2 <= min(waits) < reporting.LONGEST_S * 0.6
    assert reporting.LONGEST_S * 0.9 < max(waits) <= reporting.LONGEST_S


def test_a_restarted_process_sends_at_once_and_loses_nothing(site, port):
    with scored_images(site) as (ledger, link):
        reporting.send_due(site, ledger, link, NOW)
        assert link.paused_until is not None
    with site.ledger() as ledger, Archive(port) as pacs:
        assert reporting.send_due(site, ledger, reporting.PacsLink(), NOW) == 2
        assert len(pacs.held) == 2


def test_a_lost_answer_is_retried_with_the_same_object(site, port):
    with scored_images(site) as (ledger, link), Archive(port) as pacs:
        reporting.send_due(site, ledger, link, NOW)
        first = dict(pacs.held)
        with ledger.transaction():  # as if the process had died between Success and its row
            ledger.run("UPDATE outbox SET state = 'waiting', sent_at = NULL WHERE kind = 'sr'")
        reporting.send_due(site, ledger, reporting.PacsLink(), NOW)
        assert len(pacs.arrivals) == 3
        assert {uid: str(ds) for uid, ds in pacs.held.items()} == {uid: str(ds) for uid, ds in first.items()}


@pytest.mark.parametrize(("status_word", "outcome"), [
    (0x0000, "sent"), (0xB000, "sent"), (0xB007, "sent"), (0x0111, "sent"),
    (0xA700, "waiting"), (0x0110, "waiting"),
    (0xA900, "failed"), (0xC000, "failed"), (0x0122, "failed"), (0x0124, "failed"),
])  # fmt: skip
def test_each_status_has_its_outcome(site, port, status_word, outcome):
    with scored_images(site) as (ledger, link), Archive(port, verdict=lambda ds: status_word):
        assert reporting.send_due(site, ledger, link, NOW) == 2
        assert {state for _, state in outbox_states(ledger)} == {outcome}


def test_a_refused_object_blocks_no_other_and_is_an_alert_until_it_is_sent_again(site, port):
    def refuses_the_first(ds):
        return 0xC000 if str(ds.SOPInstanceUID) == pacs.arrivals[0] else 0

    with scored_images(site, images=3) as (ledger, link):
        with Archive(port, verdict=refuses_the_first) as pacs:
            reporting.send_due(site, ledger, link, NOW)
            assert len(pacs.held) == 5
        assert outbox.state(ledger)["failed"] == 1
        alerts = outbox.alerts(site, ledger, NOW)
        assert [kind for kind, *_ in alerts] == ["results refused"]
        assert "status C000" in alerts[0][1]
        assert status.status(site, ledger)["outbox"]["failed"] == 1
        assert rerun(ledger, None, None, True, "test") == {"images": 0, "results": 1}
        with Archive(port) as later:
            reporting.send_due(site, ledger, link, NOW)
            assert list(later.held) == pacs.arrivals[:1]
        assert outbox.alerts(site, ledger, NOW) == []


def test_a_full_pacs_is_retried_later(site, port):
    with scored_images(site) as (ledger, link):
        with Archive(port, verdict=lambda ds: 0xA700):
            assert reporting.send_due(site, ledger, link, NOW) == 2
        with Archive(port) as pacs:
            assert reporting.send_due(site, ledger, link, NOW) == 0  # not due yet
            assert reporting.send_due(site, ledger, link, NOW + timedelta(seconds=3)) == 2
            assert len(pacs.held) == 2


def test_a_pacs_that_accepts_no_reports_still_gets_the_heatmaps(site, port):
    from dicom.dataset.facts import SECONDARY_CAPTURE

    with scored_images(site, images=2) as (ledger, link):
        with Archive(port, classes=(SECONDARY_CAPTURE,)) as pacs:
            reporting.send_due(site, ledger, link, NOW)
            assert len(pacs.held) == 2
        assert sorted(set(outbox_states(ledger))) == [("sc", "sent"), ("sr", "failed")]
        assert "no accepted context" in outbox.alerts(site, ledger, NOW)[0][1]


def test_for_a_pacs_that_accepts_neither_class_both_results_fail(site, port):
    with scored_images(site) as (ledger, link), Archive(port, classes=("1.2.840.10008.1.1",)):
        reporting.send_due(site, ledger, link, NOW)
        assert {state for _, state in outbox_states(ledger)} == {"failed"}


def test_an_object_at_which_the_pacs_aborts_does_not_block_the_others(site, port):
    def hang_up_at_reports(ds):
        if ds.Modality == "SR":
            pacs.server.active_associations[0].abort()
        return 0

    with scored_images(site, images=2) as (ledger, link), Archive(port, verdict=hang_up_at_reports) as pacs:
        reporting.send_due(site, ledger, link, NOW)
        assert sorted(set(outbox_states(ledger))) == [("sc", "sent"), ("sr", "waiting")]


def test_sending_pauses_when_the_pacs_aborts_at_every_object(site, port):
    def hang_up(ds):
        pacs.server.active_associations[0].abort()
        return 0

    with scored_images(site, images=3) as (ledger, link):
        with Archive(port, verdict=hang_up) as pacs:
            assert reporting.send_due(site, ledger, link, NOW) == 0
            assert len(pacs.arrivals) == reporting.UNANSWERED
            assert reporting.send_due(site, ledger, link, NOW) == 0
            assert len(pacs.arrivals) == reporting.UNANSWERED
        with Archive(port) as pacs:
            assert reporting.send_due(site, ledger, link, NOW + timedelta(seconds=3)) == 6
            assert len(pacs.held) == 6


def test_an_image_without_its_original_is_an_alert_and_blocks_no_other(site, port):
    with scored_images(site, images=2) as (ledger, link), Archive(port) as pacs:
        site.store.path(ledger.value("SELECT original FROM image ORDER BY id LIMIT 1")).unlink()
        reporting.send_due(site, ledger, link, NOW)
        assert outbox_states(ledger) == [("sr", "failed"), ("sc", "failed"), ("sr", "sent"), ("sc", "sent")]
        assert len(pacs.held) == 2
        assert "not in the store" in outbox.alerts(site, ledger, NOW)[0][1]


def test_an_image_that_can_not_be_read_waits_and_blocks_no_other(site, port):
    with scored_images(site, images=2) as (ledger, link), Archive(port) as pacs:
        original = site.store.path(ledger.value("SELECT original FROM image WHERE id = 1"))
        original.unlink()
        original.mkdir()  # any error of reading
        reporting.send_due(site, ledger, link, NOW)
        assert outbox_states(ledger) == [("sr", "waiting"), ("sc", "waiting"), ("sr", "sent"), ("sc", "sent")]
        assert "can't be read" in ledger.value("SELECT why FROM outbox WHERE id = 1")
        assert len(pacs.held) == 2


def test_late_results_are_an_alert_with_the_reason(site, port):
    with scored_images(site) as (ledger, link):
        assert outbox.alerts(site, ledger, datetime.now(UTC)) == []
        reporting.send_due(site, ledger, link, NOW)
        (kind, detail, degraded), *_ = outbox.alerts(site, ledger, NOW)
        assert (kind, degraded) == ("results wait", True)
        assert f"no association with PACS@127.0.0.1:{port}" in detail
        assert "P0000" not in detail


def test_the_conformance_statement_lists_the_outcome_of_each_status():
    page = (Path(__file__).resolve().parents[3] / "docs" / "conformance.md").read_text("utf-8")
    rows = re.findall(r"^\| ((?:0x[0-9A-F]{4}(?:, )?)+) \| (sent|waiting|failed)", page, re.M)
    outcomes = {int(code, 16): outcome for codes, outcome in rows for code in codes.split(", ")}
    assert len(outcomes) == 12
    assert outcomes == {code: reporting.outcome_of(Sent(xray(1), code))[0] for code in outcomes}


def test_with_tls_results_go_only_to_a_pacs_with_a_trusted_certificate(tmp_path, port):
    hospital = authority(tmp_path)
    ours, theirs = hospital.issue("node", ca=hospital.pem), hospital.issue("pacs", ca=hospital.pem)
    site = make_site(
        tmp_path / "site",
        site={"findings": list(FINDINGS)},
        node={"tls_cert": str(ours.cert), "tls_key": str(ours.key), "tls_ca": str(hospital.pem)},
        results={"sr": True, "destination": f"PACS@127.0.0.1:{port}/tls"},
    )
    stranger = authority(tmp_path, "elsewhere").issue("pacs", ca=hospital.pem)
    with site.ledger() as ledger:
        put(site, xray(0))
        take_in(site, ledger)
        add_model(site, ledger, 1)
        score_all(site, ledger)
        with Archive(port, context=tls.server_context(stranger)):
            assert reporting.send_due(site, ledger, reporting.PacsLink(), NOW) == 0
        with Archive(port, context=tls.server_context(theirs)) as pacs:
            assert reporting.send_due(site, ledger, reporting.PacsLink(), NOW) == 1
            assert len(pacs.held) == 1


def test_no_query_of_the_outbox_scans_sent_results(site):
    statements = []
    with site.ledger() as ledger:
        ledger.db.set_trace_callback(statements.append)
        reporting.send_due(site, ledger, reporting.PacsLink(), NOW)
        outbox.alerts(site, ledger, NOW)
        with ledger.transaction():
            ledger.run("INSERT INTO outbox VALUES (1, 1, 'b', 'sr', NULL, 'failed', 0, '2000', NULL, '2000', NULL)")
        outbox.alerts(site, ledger, NOW)
        rerun(ledger, None, None, True, "test")
        ledger.db.set_trace_callback(None)
        queries = [sql for sql in statements if "outbox" in sql and sql.startswith(("SELECT", "UPDATE outbox"))]
        assert len(queries) >= 5
        for sql in queries:
            plan = [row["detail"] for row in ledger.rows(f"EXPLAIN QUERY PLAN {sql}")]
            assert not [step for step in plan if step.startswith(("SCAN o", "USE TEMP B-TREE"))], (sql, plan)
