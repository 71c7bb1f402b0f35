"""The outbox: every result arrives once, whatever happens on the way, and what is refused for good is kept and shown."""

import random
import re
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from agent.images import images
from agent.results import outbox
from agent.service import status
from dicom.client.sender import Sent
from dicom.dataset.facts import RESULT_UID_ROOT
from dicom.node import tls
from tests.conftest import make_site
from tests.support.agent.answering_site import NOW, an_answering_site, answering, score, states
from tests.support.agent.images import put, take_in, xray
from tests.support.agent.models import FINDINGS, add_model
from tests.support.dicom.certificates import authority
from tests.support.dicom.storage_scp import Archive, text_of
from tests.support.ports import free_port


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def site(tmp_path, port):
    return an_answering_site(tmp_path / "site", port)


def test_results_are_queued_with_the_score_and_arrive_over_one_association(site, port):
    with answering(site, images=3) as (ledger, line), Archive(port) as pacs:
        assert states(ledger) == [("sr", "waiting"), ("sc", "waiting")] * 3
        assert outbox.step(site, ledger, line, NOW) == 6
        assert outbox.step(site, ledger, line, NOW) == 0
        assert (len(pacs.held), len(pacs.arrivals), pacs.associations) == (6, 6, 1)
        assert {ds.Modality for ds in pacs.held.values()} == {"SR", "OT"}
        assert all(uid.startswith(RESULT_UID_ROOT) for uid in pacs.held)
        studies_there = {ds.StudyInstanceUID for ds in pacs.held.values()}
        assert studies_there == {row["study_uid"] for row in ledger.rows("SELECT study_uid FROM image")}
        assert ledger.value("SELECT count(*) FROM outbox WHERE heatmap IS NOT NULL") == 0


def test_what_is_sent_says_what_the_ledger_holds(site, port):
    with answering(site) as (ledger, line), Archive(port) as pacs:
        outbox.step(site, ledger, line, NOW)
        row = images.ls(site, ledger, None, 1)[0]
        report = next(ds for ds in pacs.held.values() if ds.Modality == "SR")
        text = " ".join(text_of(report))
        assert f"bundle {row['bundle']}" in text
        for finding, probability in row["predictions"].items():
            assert f"{finding} {probability:.4f}" in text
        capture = next(ds for ds in pacs.held.values() if ds.Modality == "OT")
        assert capture.pixel_array[:512, :512].std() > 1
        assert row["bundle"] in capture.ImageComments


def test_with_the_pacs_away_for_an_hour_everything_arrives_once_and_tries_grow_rarer(site, port):
    with answering(site, images=3) as (ledger, line):
        tries, now = [], NOW
        while now < NOW + timedelta(hours=1):
            tries.append(now)
            assert outbox.step(site, ledger, line, now) == 0
            assert line.shut_until is not None
            assert outbox.step(site, ledger, line, line.shut_until - timedelta(seconds=0.001)) == 0  # not even tried
            now = line.shut_until
        gaps = [(b - a).total_seconds() for a, b in pairwise(tries)]
        assert gaps[0] <= 2
        assert 150 <= max(gaps) <= outbox.LONGEST_S
        assert len(tries) < 40
        assert outbox.state(ledger)["waiting"] == 6
        with Archive(port) as pacs:
            assert outbox.step(site, ledger, line, now) == 6
            assert line.failures == 0  # the next outage begins with short waits again
            assert sorted(pacs.arrivals) == sorted(pacs.held)
            assert len(pacs.held) == 6


def test_many_appliances_do_not_ask_one_pacs_in_the_same_second():
    waits = [outbox.back_off(20, random.Random(seed)).total_seconds() for seed in range(50)]
    assert outbox.LONGEST_S / 2 <= min(waits) < outbox.LONGEST_S * 0.6
    assert outbox.LONGEST_S * 0.9 < max(waits) <= outbox.LONGEST_S


def test_a_new_process_tries_at_once_and_loses_nothing(site, port):
    with answering(site) as (ledger, line):
        outbox.step(site, ledger, line, NOW)
        assert line.shut_until is not None
    with site.ledger() as ledger, Archive(port) as pacs:
        assert outbox.step(site, ledger, outbox.Line(site), NOW) == 2
        assert len(pacs.held) == 2


def test_an_answer_that_was_lost_is_asked_for_again_and_makes_no_second_object(site, port):
    with answering(site) as (ledger, line), Archive(port) as pacs:
        outbox.step(site, ledger, line, NOW)
        first = dict(pacs.held)
        with ledger.transaction():  # as if the process had died between Success and its row
            ledger.run("UPDATE outbox SET state = 'waiting', sent_at = NULL WHERE kind = 'sr'")
        outbox.step(site, ledger, outbox.Line(site), NOW)
        assert len(pacs.arrivals) == 3
        assert {uid: str(ds) for uid, ds in pacs.held.items()} == {uid: str(ds) for uid, ds in first.items()}


@pytest.mark.parametrize(("status_word", "becomes"), [
    (0x0000, "sent"), (0xB000, "sent"), (0xB007, "sent"), (0x0111, "sent"),
    (0xA700, "waiting"), (0x0110, "waiting"),
    (0xA900, "failed"), (0xC000, "failed"), (0x0122, "failed"), (0x0124, "failed"),
])  # fmt: skip
def test_a_status_means(site, port, status_word, becomes):
    with answering(site) as (ledger, line), Archive(port, verdict=lambda ds: status_word):
        assert outbox.step(site, ledger, line, NOW) == 2
        assert {state for _, state in states(ledger)} == {becomes}


def test_one_refused_object_blocks_no_other_and_is_shown_until_it_is_sent_again(site, port):
    def refuses_the_first(ds):
        return 0xC000 if str(ds.SOPInstanceUID) == pacs.arrivals[0] else 0

    with answering(site, images=3) as (ledger, line):
        with Archive(port, verdict=refuses_the_first) as pacs:
            outbox.step(site, ledger, line, NOW)
            assert len(pacs.held) == 5
        assert outbox.state(ledger)["failed"] == 1
        said = outbox.alerts(site, ledger, NOW)
        assert [kind for kind, *_ in said] == ["results refused"]
        assert "status C000" in said[0][1]
        assert status.status(site, ledger)["outbox"]["failed"] == 1
        assert images.rerun(ledger, None, None, True, "test") == {"images": 0, "results": 1}
        with Archive(port) as later:
            outbox.step(site, ledger, line, NOW)
            assert list(later.held) == pacs.arrivals[:1]
        assert outbox.alerts(site, ledger, NOW) == []


def test_a_full_pacs_is_asked_again_later(site, port):
    with answering(site) as (ledger, line):
        with Archive(port, verdict=lambda ds: 0xA700):
            assert outbox.step(site, ledger, line, NOW) == 2
        with Archive(port) as pacs:
            assert outbox.step(site, ledger, line, NOW) == 0  # not due yet
            assert outbox.step(site, ledger, line, NOW + timedelta(seconds=3)) == 2
            assert len(pacs.held) == 2


def test_a_pacs_that_takes_no_reports_still_gets_the_heatmaps(site, port):
    from dicom.dataset.facts import SECONDARY_CAPTURE

    with answering(site, images=2) as (ledger, line):
        with Archive(port, classes=(SECONDARY_CAPTURE,)) as pacs:
            outbox.step(site, ledger, line, NOW)
            assert len(pacs.held) == 2
        assert sorted(set(states(ledger))) == [("sc", "sent"), ("sr", "failed")]
        assert "no accepted context" in outbox.alerts(site, ledger, NOW)[0][1]


def test_a_pacs_that_takes_neither_refuses_both_for_good(site, port):
    with answering(site) as (ledger, line), Archive(port, classes=("1.2.840.10008.1.1",)):
        outbox.step(site, ledger, line, NOW)
        assert {state for _, state in states(ledger)} == {"failed"}


def test_an_object_at_which_the_pacs_hangs_up_lets_the_others_pass(site, port):
    def hang_up_at_reports(ds):
        if ds.Modality == "SR":
            pacs.server.active_associations[0].abort()
        return 0

    with answering(site, images=2) as (ledger, line), Archive(port, verdict=hang_up_at_reports) as pacs:
        outbox.step(site, ledger, line, NOW)
        assert sorted(set(states(ledger))) == [("sc", "sent"), ("sr", "waiting")]


def test_a_pacs_that_hangs_up_at_everything_is_left_alone_for_a_while(site, port):
    def hang_up(ds):
        pacs.server.active_associations[0].abort()
        return 0

    with answering(site, images=3) as (ledger, line):
        with Archive(port, verdict=hang_up) as pacs:
            assert outbox.step(site, ledger, line, NOW) == 0
            assert len(pacs.arrivals) == outbox.SILENCES
            assert outbox.step(site, ledger, line, NOW) == 0
            assert len(pacs.arrivals) == outbox.SILENCES
        with Archive(port) as pacs:
            assert outbox.step(site, ledger, line, NOW + timedelta(seconds=3)) == 6
            assert len(pacs.held) == 6


def test_an_image_whose_original_is_gone_is_shown_and_blocks_no_other(site, port):
    with answering(site, images=2) as (ledger, line), Archive(port) as pacs:
        site.store.path(ledger.value("SELECT original FROM image ORDER BY id LIMIT 1")).unlink()
        outbox.step(site, ledger, line, NOW)
        assert states(ledger) == [("sr", "failed"), ("sc", "failed"), ("sr", "sent"), ("sc", "sent")]
        assert len(pacs.held) == 2
        assert "not in the store" in outbox.alerts(site, ledger, NOW)[0][1]


def test_an_image_that_the_disk_does_not_give_out_waits_and_blocks_no_other(site, port):
    with answering(site, images=2) as (ledger, line), Archive(port) as pacs:
        original = site.store.path(ledger.value("SELECT original FROM image WHERE id = 1"))
        original.unlink()
        original.mkdir()  # any error of reading
        outbox.step(site, ledger, line, NOW)
        assert states(ledger) == [("sr", "waiting"), ("sc", "waiting"), ("sr", "sent"), ("sc", "sent")]
        assert "can't be read" in ledger.value("SELECT why FROM outbox WHERE id = 1")
        assert len(pacs.held) == 2


def test_results_that_wait_long_are_an_alert_that_names_why(site, port):
    with answering(site) as (ledger, line):
        assert outbox.alerts(site, ledger, datetime.now(UTC)) == []
        outbox.step(site, ledger, line, NOW)
        (kind, detail, degraded), *_ = outbox.alerts(site, ledger, NOW)
        assert (kind, degraded) == ("results wait", True)
        assert f"no association with PACS@127.0.0.1:{port}" in detail
        assert "P0000" not in detail


def test_the_conformance_statement_says_what_is_done_on_each_status():
    page = (Path(__file__).resolve().parents[3] / "docs" / "conformance.md").read_text("utf-8")
    rows = re.findall(r"^\| ((?:0x[0-9A-F]{4}(?:, )?)+) \| (sent|waiting|failed)", page, re.M)
    said = {int(code, 16): outcome for codes, outcome in rows for code in codes.split(", ")}
    assert len(said) == 12
    assert said == {code: outbox.judged(Sent(xray(1), code))[0] for code in said}


def test_results_go_over_tls_where_the_destination_says_so_and_to_no_stranger(tmp_path, port):
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
        score(site, ledger)
        with Archive(port, context=tls.server_context(stranger)):
            assert outbox.step(site, ledger, outbox.Line(site), NOW) == 0
        with Archive(port, context=tls.server_context(theirs)) as pacs:
            assert outbox.step(site, ledger, outbox.Line(site), NOW) == 1
            assert len(pacs.held) == 1


def test_no_question_about_the_outbox_scans_what_was_sent(site):
    asked = []
    with site.ledger() as ledger:
        ledger.db.conn.set_trace_callback(asked.append)
        outbox.step(site, ledger, outbox.Line(site), NOW)
        outbox.alerts(site, ledger, NOW)
        with ledger.transaction():
            ledger.run("INSERT INTO outbox VALUES (1, 1, 'b', 'sr', NULL, 'failed', 0, '2000', NULL, '2000', NULL)")
        outbox.alerts(site, ledger, NOW)
        images.rerun(ledger, None, None, True, "test")
        ledger.db.conn.set_trace_callback(None)
        questions = [sql for sql in asked if "outbox" in sql and sql.startswith(("SELECT", "UPDATE outbox"))]
        assert len(questions) >= 5
        for sql in questions:
            plan = [row["detail"] for row in ledger.rows(f"EXPLAIN QUERY PLAN {sql}")]
            assert not [line for line in plan if line.startswith(("SCAN o", "USE TEMP B-TREE"))], (sql, plan)
