"""Storage commitment: answered for what is on disk, byte for byte; reported until it is taken, across a crash."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from certificates import authority
from conftest import make_site
from films import film, put, take_in
from pacs import associate, free_port, wait_for
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, evt

from agent import committed, up
from agent.ledger import Ledger
from dicom import commitment, tls
from dicom.commitment import CLASS_CONFLICT, NO_SUCH_INSTANCE, PROCESSING_FAILURE, SUCCESS, Pending, Request
from dicom.image import COMPUTED_RADIOGRAPHY, SECONDARY_CAPTURE
from dicom.part10 import EXPLICIT_LE
from dicom.sender import COMMITMENT_INSTANCE, STORAGE_COMMITMENT, echo, report_commitment, send

ABSENT = (SECONDARY_CAPTURE, "1.2.3.4.5.6.7.8.9")


class Pacs:
    """The asking side: sends N-ACTION, and takes N-EVENT-REPORT on a port of its own once it is open."""

    def __init__(self, port=None, answer=SUCCESS):
        self.port, self.answer = port or free_port(), answer
        self.reports: list[tuple[int, Dataset]] = []
        self.server = None

    def open(self, context=None):
        entity = AE("PACS")
        entity.add_supported_context(STORAGE_COMMITMENT, EXPLICIT_LE, scu_role=False, scp_role=True)
        handlers = [(evt.EVT_N_EVENT_REPORT, self._reported)]
        where = ("127.0.0.1", self.port)
        self.server = entity.start_server(where, block=False, evt_handlers=handlers, ssl_context=context)
        return self

    def close(self):
        if self.server:
            self.server.shutdown()

    def _reported(self, event):
        self.reports.append((event.event_type, event.event_information))
        return self.answer, None

    def ask(self, port, references, transaction=None, action=1, instance=COMMITMENT_INSTANCE, calling="PACS"):
        """Status of an N-ACTION for these (class, instance) pairs."""
        wanted = Dataset()
        wanted.TransactionUID = transaction or generate_uid()
        wanted.ReferencedSOPSequence = []
        for sop_class, sop_uid in references:
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, sop_uid
            wanted.ReferencedSOPSequence.append(item)
        association = associate(port, [(STORAGE_COMMITMENT, EXPLICIT_LE)], calling=calling)
        assert association.is_established
        status, _ = association.send_n_action(wanted, action, STORAGE_COMMITMENT, instance)
        association.release()
        return status.Status

    def told(self, count=1):
        """The newest report as (event type, UIDs held, {UID: reason}) once there are so many."""
        assert wait_for(lambda: len(self.reports) >= count)
        event_type, information = self.reports[-1]
        held = {item.ReferencedSOPInstanceUID for item in information.get("ReferencedSOPSequence", [])}
        failed = {
            item.ReferencedSOPInstanceUID: item.FailureReason for item in information.get("FailedSOPSequence", [])
        }
        return event_type, held, failed


def of(*datasets):
    return [(ds.SOPClassUID, ds.SOPInstanceUID) for ds in datasets]


@pytest.fixture
def pacs():
    one = Pacs().open()
    yield one
    one.close()


@pytest.fixture
def node(tmp_path, monkeypatch):
    """Starts the node of a site whose peer is a Pacs; gives (site, port)."""
    monkeypatch.setattr(commitment, "BACKOFF_S", (0.1,))
    stops = []

    def start(pacs, site=None, **keys):
        site = site or make_site(tmp_path / "site", node={"peers": [f"PACS@127.0.0.1:{pacs.port}"]} | keys)
        stop = threading.Event()
        thread = threading.Thread(target=up.listen, args=(site, stop))
        thread.start()
        stops.append((stop, thread))
        port = site.config.node.port
        assert wait_for(lambda: echo("127.0.0.1", port, "CXRLOOP"))
        return site, port

    yield start
    for stop, thread in stops:
        stop.set()
        thread.join()


def pending(site):
    return list((site.root / "node" / "commitment").glob("*.json"))


# What is held


def test_a_film_that_has_just_arrived_is_committed_from_the_inbox(node, pacs):
    site, port = node(pacs)
    films = [film(n) for n in range(3)]
    assert [status for _, status in send(films, "127.0.0.1", port, "CXRLOOP")] == [0] * 3
    assert pacs.ask(port, of(*films)) == SUCCESS
    assert pacs.told() == (1, {ds.SOPInstanceUID for ds in films}, {})
    assert wait_for(lambda: pending(site) == [])


def test_a_film_that_was_taken_in_is_committed_and_so_is_one_that_was_set_aside(site):
    admitted, knee, bare = film(1), film(2, body_part="KNEE"), film(3)
    del bare.PixelData
    for ds in (admitted, knee, bare):
        put(site, ds)
    with site.ledger() as ledger:
        take_in(site, ledger)
        states = {row["state"] for row in ledger.rows("SELECT state FROM image")}
    assert states == {"stored", "rejected", "quarantined"}
    assert committed.held(site, of(admitted, knee, bare)) == [SUCCESS] * 3


def test_one_that_was_never_sent_fails_and_the_others_are_committed(node, pacs):
    _, port = node(pacs)
    ds = film(0)
    list(send([ds], "127.0.0.1", port, "CXRLOOP"))
    pacs.ask(port, [*of(ds), ABSENT])
    assert pacs.told() == (2, {ds.SOPInstanceUID}, {ABSENT[1]: NO_SUCH_INSTANCE})


@pytest.fixture
def kept(site):
    """A site with one film taken in; gives (site, reference, its file)."""
    ds = film(0)
    put(site, ds)
    with site.ledger() as ledger:
        take_in(site, ledger)
        row = ledger.row("SELECT * FROM image")
    return site, *of(ds), site.root / "store" / row["original"]


def test_one_byte_changed_on_disk_is_a_processing_failure(kept):
    site, reference, path = kept
    assert committed.held(site, [reference]) == [SUCCESS]
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert committed.held(site, [reference]) == [PROCESSING_FAILURE]


def test_a_file_that_is_gone_or_cut_short_is_not_committed(kept):
    site, reference, path = kept
    os.truncate(path, path.stat().st_size - 100)
    assert committed.held(site, [reference]) == [PROCESSING_FAILURE]
    path.unlink()
    assert committed.held(site, [reference]) == [NO_SUCH_INSTANCE]


def test_another_sop_class_than_the_films_is_a_conflict_in_store_and_inbox(kept):
    site, (_, sop_uid), _ = kept
    assert committed.held(site, [(COMPUTED_RADIOGRAPHY, sop_uid)]) == [CLASS_CONFLICT]
    waiting = film(7)
    put(site, waiting)
    assert committed.held(site, [(COMPUTED_RADIOGRAPHY, waiting.SOPInstanceUID)]) == [CLASS_CONFLICT]


def test_a_film_in_the_inbox_that_is_cut_short_is_not_committed(site):
    ds = film(0)
    path = put(site, ds)
    os.truncate(path, path.stat().st_size - 1)
    assert committed.held(site, of(ds)) == [PROCESSING_FAILURE]


def test_an_intact_copy_in_the_inbox_does_not_hide_a_damaged_one_in_the_store(kept):
    site, reference, path = kept
    site.inbox.put(path.read_bytes())
    assert committed.held(site, [reference]) == [SUCCESS]
    path.write_bytes(b"")
    assert committed.held(site, [reference]) != [SUCCESS]


def test_a_damaged_film_that_is_sent_again_is_whole_again_and_said(kept, caplog):
    site, reference, path = kept
    sent = path.read_bytes()
    path.write_bytes(sent[:-7])
    assert committed.held(site, [reference]) == [PROCESSING_FAILURE]
    assert f"originals/{path.parent.name}/{path.name} is damaged" in caplog.text
    site.inbox.put(sent)
    with site.ledger() as ledger:
        take_in(site, ledger)
        notices = [row["kind"] for row in ledger.rows("SELECT kind FROM notice")]
    assert committed.held(site, [reference]) == [SUCCESS]
    assert notices == ["damaged"]


def test_films_are_found_at_every_moment_of_their_intake(site):
    films = [film(n) for n in range(40)]
    for n, ds in enumerate(films):
        put(site, ds, f"{n}.dcm")

    def intake():
        with site.ledger() as ledger:
            take_in(site, ledger)

    taking = threading.Thread(target=intake)
    taking.start()
    answers = [committed.held(site, of(*films))]
    while taking.is_alive():
        answers.append(committed.held(site, of(*films)))
    assert site.inbox.waiting() == []
    assert [answer for answer in answers if answer != [SUCCESS] * 40] == []


def test_the_ledger_is_read_without_the_right_to_write_beside_it(kept):
    site, reference, _ = kept
    ledger = site.root / "ledger.db"
    for name in ("-wal", "-shm"):
        ledger.with_name(ledger.name + name).unlink(missing_ok=True)
    before = sorted(path.name for path in site.root.iterdir())
    assert committed.held(site, [reference]) == [SUCCESS]
    with Ledger(ledger):  # a running agent
        assert committed.held(site, [reference]) == [SUCCESS]
    assert sorted(path.name for path in site.root.iterdir()) == before


def test_while_the_ledger_cannot_be_read_a_request_waits_and_nothing_is_denied(node, pacs):
    site, port = node(pacs)
    ds = film(0)
    put(site, ds)
    with site.ledger() as ledger:
        take_in(site, ledger)
    place, hidden = site.root / "ledger.db", site.root / "ledger.hidden"
    place.rename(hidden)
    place.write_bytes(b"not a database")
    assert pacs.ask(port, of(ds)) == SUCCESS
    assert wait_for(lambda: pending(site) != []) and pacs.reports == []
    hidden.rename(place)
    assert pacs.told() == (1, {ds.SOPInstanceUID}, {})


def test_looking_up_a_thousand_uids_uses_the_index(site):
    with site.ledger() as ledger:
        sql = "EXPLAIN QUERY PLAN SELECT sop_uid FROM image WHERE sop_uid IN (SELECT value FROM json_each(?))"
        plan = " ".join(row["detail"] for row in ledger.rows(sql, json.dumps(["1.2"] * 1000)))
    assert "SCAN image" not in plan


# What is refused


def test_requests_that_make_no_sense_are_refused_and_leave_nothing(node, pacs):
    site, port = node(pacs)
    good = [ABSENT]
    assert pacs.ask(port, good, action=2) == commitment.NO_SUCH_ACTION
    assert pacs.ask(port, good, instance="1.2.840.10008.1.20.1.9") == commitment.NO_SUCH_INSTANCE
    assert pacs.ask(port, []) == commitment.INVALID_ARGUMENT
    assert pacs.ask(port, [("1.2", "1.2/../x")]) == commitment.INVALID_ARGUMENT
    assert pacs.ask(port, good, calling="STRANGER") == commitment.NOT_AUTHORISED
    assert pending(site) == []
    assert echo("127.0.0.1", port, "CXRLOOP")


def test_a_peer_that_asks_endlessly_and_never_listens_is_refused(node, monkeypatch):
    monkeypatch.setattr(commitment, "MOST_PENDING", 2)
    deaf = Pacs()
    site, port = node(deaf)
    assert [deaf.ask(port, [ABSENT]) for _ in range(3)] == [SUCCESS, SUCCESS, commitment.RESOURCE_LIMITATION]
    assert len(pending(site)) == 2


def test_a_full_disk_is_a_resource_limitation(node, pacs):
    site, port = node(pacs)
    folder = site.root / "node" / "commitment"
    folder.rmdir()
    assert pacs.ask(port, [ABSENT]) == commitment.RESOURCE_LIMITATION
    folder.mkdir()
    assert pacs.ask(port, [ABSENT]) == SUCCESS


# The report


def test_a_report_is_repeated_until_the_peer_is_there(node):
    pacs = Pacs()
    site, port = node(pacs)
    assert pacs.ask(port, [ABSENT]) == SUCCESS
    assert len(pending(site)) == 1
    pacs.open()
    assert pacs.told()[0] == 2
    assert wait_for(lambda: pending(site) == [])
    pacs.close()


def test_a_peer_that_takes_the_report_with_a_failure_gets_it_again(node, pacs):
    pacs.answer = PROCESSING_FAILURE
    site, port = node(pacs)
    pacs.ask(port, [ABSENT])
    assert wait_for(lambda: len(pacs.reports) >= 2)
    pacs.answer = SUCCESS
    assert wait_for(lambda: pending(site) == [])


def test_one_transaction_asked_twice_is_one_request(node):
    pacs = Pacs()
    site, port = node(pacs)
    transaction = generate_uid()
    assert [pacs.ask(port, [ABSENT], transaction) for _ in range(2)] == [SUCCESS] * 2
    assert len(pending(site)) == 1


def test_kill_9_between_the_answer_and_the_report_loses_no_request(tmp_path):
    pacs = Pacs()
    site = make_site(tmp_path / "site", node={"peers": [f"PACS@127.0.0.1:{pacs.port}"]})
    command = [sys.executable, "-m", "agent.cli", "serve", "--only", "listen", "--config", str(site.root)]
    port = site.config.node.port
    serving = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    ds = film(0)
    try:
        assert wait_for(lambda: echo("127.0.0.1", port, "CXRLOOP"), 30)
        list(send([ds], "127.0.0.1", port, "CXRLOOP"))
        assert pacs.ask(port, [*of(ds), ABSENT]) == SUCCESS
        serving.send_signal(signal.SIGKILL)
        serving.wait()
        pacs.open()
        serving = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        assert wait_for(lambda: pacs.reports, 30)
        assert pacs.told() == (2, {ds.SOPInstanceUID}, {ABSENT[1]: NO_SUCH_INSTANCE})
        assert wait_for(lambda: pending(site) == [])
    finally:
        serving.kill()
        serving.wait()
        pacs.close()


def test_a_peer_that_hangs_up_at_once_or_refuses_the_role_does_not_hold_up_the_reports(monkeypatch):
    monkeypatch.setattr("dicom.sender.TIMEOUT", 3)
    about = commitment.event_information(Request("PACS", "1.2.3", (ABSENT,), 0), [NO_SUCH_INSTANCE])
    for handlers, roles in (
        ([(evt.EVT_ESTABLISHED, lambda event: event.assoc.abort())], {"scu_role": False, "scp_role": True}),
        ([(evt.EVT_N_EVENT_REPORT, lambda event: event.assoc.abort())], {"scu_role": False, "scp_role": True}),
        ([], {"scu_role": True, "scp_role": False}),
    ):
        entity = AE("PACS")
        entity.add_supported_context(STORAGE_COMMITMENT, EXPLICIT_LE, **roles)
        server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        began = time.monotonic()
        where = ("127.0.0.1", server.server_address[1])
        assert report_commitment(about, commitment.SOME_FAILED, *where, "PACS", "CXRLOOP") is None
        assert time.monotonic() - began < 10  # seconds; a wait in vain would have no end
        server.shutdown()


def engine(folder, report, held=lambda references: [SUCCESS] * len(references)):
    return commitment.Commitment(Pending(folder), frozenset({"PACS", "DEAD"}), held, report)


def test_the_same_request_waits_longer_after_each_failure_and_is_dropped_after_three_days(tmp_path):
    tried = []
    one = engine(tmp_path, lambda *report: bool(tried.append(report)))
    Pending(tmp_path).keep(Request("PACS", "1.2.3", (ABSENT,), at=0))
    now, waits = 1.0, []
    for _ in range(len(commitment.BACKOFF_S) + 1):
        due = one.step(now)
        waits.append(due - now)
        now = due
    assert waits == [*commitment.BACKOFF_S, commitment.BACKOFF_S[-1]]
    assert len(tried) == len(waits)
    assert one.step(commitment.KEPT_S + 1) is None
    assert list(tmp_path.iterdir()) == []


def test_a_dead_peer_costs_one_attempt_and_does_not_keep_the_others_waiting(tmp_path):
    tried = []

    def report(peer, *_):
        tried.append(peer)
        return peer == "PACS"

    for n, peer in enumerate(("DEAD", "DEAD", "DEAD", "PACS")):
        Pending(tmp_path).keep(Request(peer, f"1.2.{n}", (ABSENT,), at=n))
    engine(tmp_path, report).step(10)
    assert tried == ["DEAD", "PACS"]


def test_a_crash_while_writing_a_request_leaves_nothing_that_counts(tmp_path):
    (tmp_path / "half.tmp").write_text('{"peer": "PA')
    assert Pending(tmp_path).all() == []
    assert list(tmp_path.iterdir()) == []


def test_reports_go_over_tls_to_a_peer_that_speaks_it(node, tmp_path):
    hospital = authority(tmp_path)
    ours, theirs = hospital.issue("node", ca=hospital.pem), hospital.issue("pacs", ca=hospital.pem)
    pacs = Pacs().open(tls.serving(theirs))
    site = make_site(
        tmp_path / "site",
        node={
            "peers": [f"PACS@localhost:{pacs.port}/tls"],
            "tls_cert": str(ours.cert),
            "tls_key": str(ours.key),
            "tls_ca": str(ours.ca),
        },
    )
    Pending(site.root / "node" / "commitment").keep(Request("PACS", "1.2.3", (ABSENT,), time.time()))
    stop = threading.Event()
    thread = threading.Thread(target=up.listen, args=(site, stop))
    thread.start()
    try:
        assert pacs.told() == (2, set(), {ABSENT[1]: NO_SUCH_INSTANCE})
    finally:
        stop.set()
        thread.join()
        pacs.close()
