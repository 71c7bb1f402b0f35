"""The report of a storage commitment: repeated until it is taken, across a crash, holding up nobody."""

import signal
import subprocess
import sys
import threading
import time

import pytest
from pydicom.uid import generate_uid
from pynetdicom import AE, evt

from agent.network.node import listen
from dicom.client.sender import STORAGE_COMMITMENT, echo, report_commitment, send
from dicom.dataset.part10 import EXPLICIT_LE
from dicom.node import commitment, tls
from dicom.node.commitment import NO_SUCH_INSTANCE, PROCESSING_FAILURE, SUCCESS, Pending, Request
from tests.conftest import make_site
from tests.support.agent.images import xray
from tests.support.dicom.certificates import authority
from tests.support.dicom.commitment_peer import ABSENT, Pacs, nodes, of, pending
from tests.support.dicom.pacs import wait_for


@pytest.fixture
def pacs():
    one = Pacs().open()
    yield one
    one.close()


@pytest.fixture
def node(tmp_path, monkeypatch):
    """Starts the node of a site whose peer is a Pacs; gives (site, port)."""
    monkeypatch.setattr(commitment, "BACKOFF_S", (0.1,))
    with nodes(tmp_path) as start:
        yield start


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
    command = [sys.executable, "-m", "agent.cli.main", "serve", "--only", "listen", "--config", str(site.root)]
    port = site.config.node.port
    serving = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    ds = xray(0)
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
    pacs = Pacs().open(tls.server_context(theirs))
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
        assert pacs.told() == (2, set(), {ABSENT[1]: NO_SUCH_INSTANCE})
    finally:
        stop.set()
        thread.join()
        pacs.close()
