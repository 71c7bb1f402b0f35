"""Reports of storage commitment: repeated until accepted, also after a crash, without delaying others."""

import signal
import subprocess
import sys
import threading
import time

import pytest
from pydicom.uid import generate_uid
from pynetdicom import AE, evt

from agent.network.node import listen
from dicom.client.sender import echo, report_commitment, send
from dicom.dataset.facts import STORAGE_COMMITMENT
from dicom.dataset.part10 import EXPLICIT_LE
from dicom.node import commitment, tls
from dicom.node.commitment import NO_SUCH_INSTANCE, PROCESSING_FAILURE, SUCCESS, Pending, Request
from tests.conftest import make_site
from tests.support.agent.images import xray
from tests.support.dicom.certificates import authority
from tests.support.dicom.commitment_peer import ABSENT, CommitmentScu, pending_requests, references, running_sites
from tests.support.dicom.pacs import wait_for


@pytest.fixture
def pacs():
    scu = CommitmentScu().open()
    yield scu
    scu.close()


@pytest.fixture
def node(tmp_path, monkeypatch):
    """Return a function that starts the node of a site whose peer is a CommitmentScu; it returns (site, port)."""
    monkeypatch.setattr(commitment, "BACKOFF_S", (0.1,))
    with running_sites(tmp_path) as start:
        yield start


def test_a_report_is_repeated_until_the_peer_is_reachable(node):
    pacs = CommitmentScu()
    site, port = node(pacs)
    assert pacs.request(port, [ABSENT]) == SUCCESS
    assert len(pending_requests(site)) == 1
    pacs.open()
    assert pacs.last_report()[0] == 2
    assert wait_for(lambda: pending_requests(site) == [])
    pacs.close()


def test_a_report_answered_with_a_failure_is_sent_again(node, pacs):
    pacs.answer = PROCESSING_FAILURE
    site, port = node(pacs)
    pacs.request(port, [ABSENT])
    assert wait_for(lambda: len(pacs.reports) >= 2)
    pacs.answer = SUCCESS
    assert wait_for(lambda: pending_requests(site) == [])


def test_a_repeated_transaction_is_one_request(node):
    pacs = CommitmentScu()
    site, port = node(pacs)
    transaction = generate_uid()
    assert [pacs.request(port, [ABSENT], transaction) for _ in range(2)] == [SUCCESS] * 2
    assert len(pending_requests(site)) == 1


def test_kill_9_between_the_answer_and_the_report_loses_no_request(tmp_path):
    pacs = CommitmentScu()
    site = make_site(tmp_path / "site", node={"peers": [f"PACS@127.0.0.1:{pacs.port}"]})
    command = [sys.executable, "-m", "agent.cli.main", "serve", "--only", "listen", "--config", str(site.root)]
    port = site.config.node.port
    serving = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    ds = xray(0)
    try:
        assert wait_for(lambda: echo("127.0.0.1", port, "CXRLOOP"), 30)
        list(send([ds], "127.0.0.1", port, "CXRLOOP"))
        assert pacs.request(port, [*references(ds), ABSENT]) == SUCCESS
        serving.send_signal(signal.SIGKILL)
        serving.wait()
        pacs.open()
        serving = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        assert wait_for(lambda: pacs.reports, 30)
        assert pacs.last_report() == (2, {ds.SOPInstanceUID}, {ABSENT[1]: NO_SUCH_INSTANCE})
        assert wait_for(lambda: pending_requests(site) == [])
    finally:
        serving.kill()
        serving.wait()
        pacs.close()


def test_a_peer_that_disconnects_or_refuses_the_role_does_not_delay_reports(monkeypatch):
    monkeypatch.setattr("dicom.client.sender.TIMEOUT", 3)
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
        assert time.monotonic() - began < 10  # seconds; without the check the wait would be endless
        server.shutdown()


def commitment_engine(folder, report, check=lambda references: [SUCCESS] * len(references)):
    return commitment.Commitment(Pending(folder), frozenset({"PACS", "DEAD"}), check, report)


def test_retries_back_off_and_a_request_is_dropped_after_three_days(tmp_path):
    attempts = []
    scu = commitment_engine(tmp_path, lambda *report: bool(attempts.append(report)))
    Pending(tmp_path).keep(Request("PACS", "1.2.3", (ABSENT,), at=0))
    now, waits = 1.0, []
    for _ in range(len(commitment.BACKOFF_S) + 1):
        due = scu.step(now)
        waits.append(due - now)
        now = due
    assert waits == [*commitment.BACKOFF_S, commitment.BACKOFF_S[-1]]
    assert len(attempts) == len(waits)
    assert scu.step(commitment.KEPT_S + 1) is None
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_peer_costs_one_attempt_and_does_not_delay_others(tmp_path):
    attempts = []

    def report(peer, *_):
        attempts.append(peer)
        return peer == "PACS"

    for n, peer in enumerate(("DEAD", "DEAD", "DEAD", "PACS")):
        Pending(tmp_path).keep(Request(peer, f"1.2.{n}", (ABSENT,), at=n))
    commitment_engine(tmp_path, report).step(10)
    assert attempts == ["DEAD", "PACS"]


def test_a_crash_while_writing_a_request_leaves_no_request(tmp_path):
    (tmp_path / "half.tmp").write_text('{"peer": "PA')
    assert Pending(tmp_path).all() == []
    assert list(tmp_path.iterdir()) == []


def test_reports_use_tls_for_a_peer_with_tls(node, tmp_path):
    hospital = authority(tmp_path)
    ours, theirs = hospital.issue("node", ca=hospital.pem), hospital.issue("pacs", ca=hospital.pem)
    pacs = CommitmentScu().open(tls.server_context(theirs))
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
    thread = threading.Thread(target=listen, args=(site, stop))
    thread.start()
    try:
        assert pacs.last_report() == (2, set(), {ABSENT[1]: NO_SUCH_INSTANCE})
    finally:
        stop.set()
        thread.join()
        pacs.close()
