"""Timeouts and refusals of the node: slow, stalled and silent senders, and how refusals are counted."""

import logging
import threading
import time

import pytest

from dicom.dataset.facts import DIGITAL_XRAY_PRESENTATION as DX
from dicom.dataset.part10 import EXPLICIT_LE
from dicom.node.dimse_command import p_data, pdv
from dicom.node.listener import Listener, Node
from dicom.node.refusals import WINDOW, Refusals
from dicom.store.inbox import Inbox
from tests.support.dicom.hostile_inputs import BIG, file_names, running_listeners
from tests.support.dicom.pacs import data_set, wait_for, xray
from tests.support.dicom.raw_scu import A_ABORT, A_ASSOCIATE_AC, Scu, answers_echo

DATA, UID = data_set(BIG), str(BIG.SOPInstanceUID)


@pytest.fixture
def node(tmp_path):
    with running_listeners(tmp_path) as start:
        yield start


def test_a_sender_below_the_minimum_pace_is_aborted(node):
    listener, inbox = node(stall=1, max_associations=1)
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        scu.start_store(DX, UID)
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 10:
                scu.send(p_data(pdv(1, 0, b"x")))  # complete PDUs without a long pause, but below the minimum pace
                time.sleep(0.1)
        assert time.monotonic() - began < 5
    assert wait_for(lambda: answers_echo(listener.port))
    assert file_names(inbox) == []


def test_a_sender_that_stops_in_the_middle_is_aborted(node):
    listener, inbox = node(stall=1)
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        scu.start_store(DX, UID)
        scu.send_data(DATA[:200_000], last=False)
        assert scu.receive() == (A_ABORT, bytes([0, 0, 2, 0]))
    assert wait_for(lambda: file_names(inbox) == [])


def test_a_slow_sender_above_the_minimum_pace_is_not_aborted(node):
    listener, inbox = node(stall=1)
    ds = xray(4, side=350, bits=12)
    data = data_set(ds)
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        scu.start_store(DX, ds.SOPInstanceUID)
        for at in range(0, len(data), 20_000):
            scu.send_data(data[at : at + 20_000], last=at + 20_000 >= len(data))
            time.sleep(0.2)
        assert scu.status() == 0
    assert len(inbox.waiting()) == 1


def test_a_pause_between_images_does_not_count_as_slow(node):
    listener, inbox = node(stall=1)
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        for seed in range(2):
            ds = xray(seed)  # fewer bytes than the minimum pace requires for one message
            assert scu.store(data_set(ds), DX, ds.SOPInstanceUID) == 0
            time.sleep(1.2)
    assert len(inbox.waiting()) == 2


def test_a_silent_association_is_ended(node):
    listener, _ = node(idle=1)
    with Scu(listener.port) as scu:
        assert scu.associate([(DX, EXPLICIT_LE)]) == A_ASSOCIATE_AC
        assert scu.store(DATA, DX, UID) == 0
        assert scu.closed_within(5)


def test_stopping_ends_a_stalled_transfer(tmp_path):
    inbox = Inbox(tmp_path / "inbox", 0)
    listener = Listener(Node(port=0), inbox)
    listener.start()
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        scu.start_store(DX, UID)
        scu.send_data(DATA[:100_000], last=False)
        assert wait_for(lambda: file_names(inbox))
        stopping = threading.Thread(target=listener.stop)
        stopping.start()
        assert scu.closed_within(9)
        stopping.join(9)
    assert wait_for(lambda: file_names(inbox) == [])


def test_every_refusal_is_counted_and_a_flood_is_logged_in_two_lines(node, caplog):
    listener, _ = node()
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        assert {scu.store(DATA[:300], DX, UID) for _ in range(100)} == {0xC000}
    assert wait_for(lambda: listener.refusals.totals == {"C000": 100})
    assert len(caplog.records) == 1
    listener.refusals.flush(time.monotonic() + WINDOW)
    assert "refused 99 more from 127.0.0.1: 99 x C000" in caplog.text


def test_the_log_window_of_each_peer_is_separate_and_ends(caplog):
    refusals = Refusals(logging.getLogger("cxrloop.listen"))
    for second in range(3):
        for peer in ("10.0.0.1", "10.0.0.2"):
            refusals.note(peer, "A900", "because", now=float(second))
    assert len(caplog.records) == 2
    refusals.flush(now=WINDOW + 1.0)
    refusals.flush(now=2 * WINDOW + 2.0)
    refusals.note("10.0.0.1", "A900", "because", now=2 * WINDOW + 3.0)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "refused A900 from 10.0.0.1",
        "refused A900 from 10.0.0.2",
        "refused 2 more from 10.0.0.1",
        "refused 2 more from 10.0.0.2",
        "refused A900 from 10.0.0.1",
    ]
    assert refusals.totals == {"A900": 7}
