"""Time and refusals at the node: who drips, stops or says nothing loses its seat, who is slow keeps it, all is counted."""

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
from tests.support.dicom.hostile_inputs import BIG, everything, nodes
from tests.support.dicom.pacs import data_set, wait_for, xray
from tests.support.dicom.raw_scu import A_ABORT, A_ASSOCIATE_AC, Scu, echoes

DATA, UID = data_set(BIG), str(BIG.SOPInstanceUID)


@pytest.fixture
def node(tmp_path):
    with nodes(tmp_path) as start:
        yield start


def test_a_sender_that_drips_loses_its_seat(node):
    listener, inbox = node(stall=1, max_associations=1)
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        scu.begin(DX, UID)
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 10:
                scu.say(p_data(pdv(1, 0, b"x")))  # whole PDUs, each in time: it is the pace that is wrong
                time.sleep(0.1)
        assert time.monotonic() - began < 5
    assert wait_for(lambda: echoes(listener.port))
    assert everything(inbox) == []


def test_a_sender_that_stops_in_the_middle_loses_its_seat(node):
    listener, inbox = node(stall=1)
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        scu.begin(DX, UID)
        scu.data(DATA[:200_000], last=False)
        assert scu.hear() == (A_ABORT, bytes([0, 0, 2, 0]))
    assert wait_for(lambda: everything(inbox) == [])


def test_a_slow_line_keeps_its_seat(node):
    listener, inbox = node(stall=1)
    ds = xray(4, side=350, bits=12)
    data = data_set(ds)
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        scu.begin(DX, ds.SOPInstanceUID)
        for at in range(0, len(data), 20_000):
            scu.data(data[at : at + 20_000], last=at + 20_000 >= len(data))
            time.sleep(0.2)
        assert scu.status() == 0
    assert len(inbox.waiting()) == 1


def test_a_rest_between_images_is_no_slow_image(node):
    listener, inbox = node(stall=1)
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        for seed in range(2):
            ds = xray(seed)  # all that was said is less than the pace asks of a message
            assert scu.store(data_set(ds), DX, ds.SOPInstanceUID) == 0
            time.sleep(1.2)
    assert len(inbox.waiting()) == 2


def test_an_association_that_says_nothing_is_ended(node):
    listener, _ = node(idle=1)
    with Scu(listener.port) as scu:
        assert scu.associate([(DX, EXPLICIT_LE)]) == A_ASSOCIATE_AC
        assert scu.store(DATA, DX, UID) == 0
        assert scu.ends(5)


def test_stopping_ends_a_transfer_that_stands_still(tmp_path):
    inbox = Inbox(tmp_path / "inbox", 0)
    listener = Listener(Node(port=0), inbox)
    listener.start()
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        scu.begin(DX, UID)
        scu.data(DATA[:100_000], last=False)
        assert wait_for(lambda: everything(inbox))
        stopping = threading.Thread(target=listener.stop)
        stopping.start()
        assert scu.ends(9)
        stopping.join(9)
    assert wait_for(lambda: everything(inbox) == [])


def test_every_refusal_is_counted_and_a_flood_is_two_lines(node, caplog):
    listener, _ = node()
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        assert {scu.store(DATA[:300], DX, UID) for _ in range(100)} == {0xC000}
    assert wait_for(lambda: listener.refusals.totals == {"C000": 100})
    assert len(caplog.records) == 1
    listener.refusals.flush(time.monotonic() + WINDOW)
    assert "refused 99 more from 127.0.0.1: 99 x C000" in caplog.text


def test_a_peer_that_goes_quiet_is_forgotten_and_others_are_heard(caplog):
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
