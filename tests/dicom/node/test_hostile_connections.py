"""Bad inputs 19 to 24 of 26: connections, titles and disks (1 to 18, 26: test_hostile.py; 25: test_kill.py)."""

import resource
import struct
import time

import pytest
from pydicom import dcmread

from dicom.dataset.part10 import EXPLICIT_LE
from dicom.node import reception
from dicom.node.listener import Listener, Node
from dicom.node.server import HALF_OPEN_PEER
from dicom.store.inbox import Inbox
from tests.support.dicom.hostile_inputs import BIG, DATA, DX, UID, file_names, running_listeners
from tests.support.dicom.pacs import data_set, wait_for
from tests.support.dicom.raw_scu import A_ABORT, A_ASSOCIATE_AC, A_ASSOCIATE_RJ, Scu, answers_echo, associate_rq


@pytest.fixture
def node(tmp_path):
    with running_listeners(tmp_path) as start:
        yield start


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x01\x00\xff\xff\xff\xff" + b"x" * 100,
        b"\x99" * 500,
        associate_rq([(DX, "1")])[:40],
    ],
    ids=["HTTP", "length of 4 GB", "unknown PDU", "half an A-ASSOCIATE-RQ"],
)
def test_19_garbage_is_disconnected_in_time_and_does_not_flood_the_log(node, noise, caplog):
    listener, inbox = node(artim=1)
    for _ in range(3):
        with Scu(listener.port) as scu:
            scu.send(noise)
            assert scu.closed_within(4)
    assert file_names(inbox) == []
    assert len(caplog.records) <= 2


@pytest.mark.parametrize("length", [0xFFFFFFF0, 131073])
def test_20_a_pdu_longer_than_negotiated_is_aborted_at_once(node, length):
    listener, inbox = node()
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        scu.start_store(DX, UID)
        scu.send(struct.pack(">BxLLBB", 4, length, length - 4, 1, 0) + b"x" * 100_000)
        assert scu.receive() == (A_ABORT, bytes([0, 0, 2, 6]))  # by the provider: invalid PDU parameter
    assert wait_for(lambda: file_names(inbox) == [])


def test_21_thirty_idle_connections_delay_nobody_and_are_closed(node):
    listener, _ = node(artim=2)
    idle = [Scu(listener.port) for _ in range(30)]
    times = []
    for _ in range(5):
        began = time.monotonic()
        assert answers_echo(listener.port)
        times.append(time.monotonic() - began)
    assert min(times) < 0.5  # seconds; 0.1 on an idle machine
    assert all(connection.closed_within(5) for connection in idle)
    for connection in idle:
        connection.wire.close()
    assert listener.refusals.totals == {"silent": 30}


@pytest.mark.parametrize("first_bytes", [b"", b"\1"], ids=["nothing", "one byte"])
def test_21_one_address_has_a_limit_of_half_open_connections(node, first_bytes):
    listener, _ = node(artim=6)
    idle = [Scu(listener.port) for _ in range(HALF_OPEN_PEER)]
    for connection in idle:
        connection.send(first_bytes)
    with Scu(listener.port) as one_more:
        assert one_more.closed_within(4)
    for connection in idle:
        connection.wire.close()
    assert wait_for(lambda: answers_echo(listener.port))


def test_22_dead_connections_do_not_reduce_the_number_of_associations(node):
    listener, _ = node(max_associations=6, max_per_peer=32)
    idle = [Scu(listener.port) for _ in range(20)]
    asking = [Scu(listener.port) for _ in range(12)]
    answers = [scu.associate([(DX, EXPLICIT_LE)]) for scu in asking]
    assert answers == [A_ASSOCIATE_AC] * 6 + [A_ASSOCIATE_RJ] * 6
    assert {scu.answer[1:] for scu in asking[6:]} == {bytes([2, 3, 2])}  # transient, presentation, local limit
    for scu in idle + asking:
        scu.wire.close()


def test_22_one_address_has_a_limit_of_associations(node):
    listener, _ = node(max_associations=6, max_per_peer=2)
    asking = [Scu(listener.port) for _ in range(4)]
    assert [scu.associate([(DX, EXPLICIT_LE)]) for scu in asking] == [2, 2, 3, 3]
    assert asking[0].release()
    asking[0].wire.close()
    with Scu(listener.port) as scu:
        assert scu.associate([(DX, EXPLICIT_LE)]) == A_ASSOCIATE_AC
    for scu in asking[1:]:
        scu.wire.close()


def test_23_another_called_title_is_rejected_with_1_1_7(node):
    listener, _ = node()
    with Scu(listener.port) as scu:
        assert scu.associate([(DX, EXPLICIT_LE)], called="WARD3") == A_ASSOCIATE_RJ
        assert scu.answer[1:] == bytes([1, 1, 7])


def test_24_a_disk_that_fills_during_a_transfer_is_a700_leaves_nothing_and_recovers(node):
    listener, inbox = node()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            assert scu.store(data_set(BIG), DX, BIG.SOPInstanceUID) == reception.OUT_OF_RESOURCES
            assert file_names(inbox) == []
            assert scu.store(DATA, DX, UID) == 0  # this image is small enough
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert scu.store(data_set(BIG), DX, BIG.SOPInstanceUID) == 0
    assert [dcmread(path).SOPInstanceUID for path in inbox.waiting()] == [UID, BIG.SOPInstanceUID]


def test_24_too_little_disk_is_a700_before_a_byte_is_written_and_recovers(node):
    listener, inbox = node(min_free_bytes=1 << 60)
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        assert scu.store(DATA, DX, UID) == reception.OUT_OF_RESOURCES
        assert file_names(inbox) == []
        inbox.min_free_bytes = 0
        assert scu.store(DATA, DX, UID) == 0


def test_24_a_full_node_rejects_storage_associations_and_answers_c_echo(tmp_path):
    full: list[str | None] = ["less than 1024 MiB are free"]
    listener = Listener(Node(port=0), Inbox(tmp_path, 0), full=lambda: full[0])
    listener.start()
    with Scu(listener.port) as scu:
        assert scu.associate([(DX, EXPLICIT_LE)]) == A_ASSOCIATE_RJ
        assert scu.answer[1:] == bytes([2, 3, 1])  # transient, presentation, temporary congestion
    assert answers_echo(listener.port)
    full[0] = None
    with Scu(listener.port) as scu:
        assert scu.associate([(DX, EXPLICIT_LE)]) == A_ASSOCIATE_AC
    listener.stop()
