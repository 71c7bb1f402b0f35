"""Reading PDUs: any split of the bytes, commands, messages out of order, and pynetdicom's own tests."""

import os
import struct
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pynetdicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import UID as Uid
from pynetdicom.dimse_messages import C_STORE_RQ, C_STORE_RSP
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import decode

from dicom.dataset.facts import DIGITAL_XRAY_PRESENTATION as DX
from dicom.dataset.part10 import EXPLICIT_LE
from dicom.node.dimse_command import C_STORE_RQ as STORE
from dicom.node.dimse_command import Command, p_data, parse, pdv, store_response
from dicom.node.listener import Listener, Node
from dicom.node.socket_reader import BUFFER
from dicom.store.inbox import Inbox
from tests.support.dicom.hostile_inputs import file_names, running_listeners
from tests.support.dicom.pacs import data_set, wait_for, xray
from tests.support.dicom.raw_scu import A_ABORT, COMMAND, IMPLICIT, LAST, VERIFICATION, Scu, answers_echo, command

GOOD = xray(3, side=1000, bits=12)  # 2 MB: twice the buffer
DATA, UID = data_set(GOOD), str(GOOD.SOPInstanceUID)


@pytest.fixture
def node(tmp_path):
    with running_listeners(tmp_path) as start:
        yield start


# pynetdicom


def test_the_version_of_pynetdicom_is_the_one_that_was_patched():
    assert (
        pynetdicom.__version__ == "3.0.4"
    )  # for another version run its test_dul, test_fsm and test_assoc with our reader


def test_pynetdicoms_own_tests_pass_with_our_reader(tmp_path):
    root, plugins = Path(__file__).parents[3], ["-p", "tests.support.dicom.pdu_reader_plugin", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, "--pyargs", "pynetdicom.tests.test_dul"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout[-3000:]


# Commands


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 0xFFFF), st.from_regex(r"[12](\.[1-9][0-9]{0,9}){1,5}", fullmatch=True))
def test_a_request_is_read_as_pynetdicom_writes_it(number, uid):
    request = C_STORE()
    request.MessageID, request.Priority = number, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = Uid(DX), Uid(uid)
    message = C_STORE_RQ()
    message.primitive_to_message(request)
    (sent,) = list(message.encode_msg(1, 16384))
    assert parse(sent.presentation_data_value_list[0][1][1:]) == Command(STORE, False, number, DX, uid)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 0xFFFF), st.sampled_from([0, 0xA700, 0xC000]), st.text(max_size=90))
def test_a_response_is_what_pynetdicom_reads(number, status, why):
    message = C_STORE_RSP()
    message.encoded_command_set.write(store_response(Command(STORE, True, number, DX, "1.2.3"), status, why))
    message.command_set = decode(message.encoded_command_set, True, True)
    command_set = message.command_set
    assert (command_set.MessageIDBeingRespondedTo, command_set.Status, command_set.CommandField) == (
        number,
        status,
        0x8001,
    )
    assert (command_set.AffectedSOPClassUID, command_set.AffectedSOPInstanceUID) == (DX, "1.2.3")
    assert len(command_set.get("ErrorComment", "") or "") <= 64


@given(st.binary(max_size=200))
def test_malformed_commands_raise_only_value_error(noise):
    try:
        parse(noise)
    except ValueError:
        return


# Fragments


@pytest.fixture(scope="module")
def shared_listener(tmp_path_factory):
    """Yield (listener, inbox), shared by many small cases."""
    inbox = Inbox(tmp_path_factory.mktemp("standing"), 0)
    listener = Listener(Node(port=0), inbox)
    listener.start()
    yield listener, inbox
    listener.stop()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_an_image_arrives_byte_for_byte_in_any_split_into_values_pdus_and_packets(shared_listener, data):
    listener, inbox = shared_listener
    encoded = command(1, DX, UID)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(DATA)), max_size=6)))
    edge = data.draw(st.integers(0, len(encoded)))
    values = [pdv(1, 1, encoded[:edge]), pdv(1, COMMAND, encoded[edge:])]
    bounds = [0, *cuts, len(DATA)]
    for n, (first, last) in enumerate(pairwise(bounds)):
        for at in range(first, max(last, first + 1), 60_000):
            final = n == len(bounds) - 2 and at + 60_000 >= last
            values.append(pdv(1, LAST if final else 0, DATA[at : min(at + 60_000, last)]))
    wire, pack = b"", data.draw(st.integers(1, 2))
    for at in range(0, len(values), pack):
        wire += p_data(b"".join(values[at : at + pack]))
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        packets = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=4)))
        for first, last in zip([0, *packets], [*packets, len(wire)], strict=True):
            scu.send(wire[first:last])
        assert scu.status() == 0
    (path,) = inbox.waiting()
    assert path.read_bytes().endswith(DATA)
    path.unlink()


@pytest.mark.parametrize("before", [4, 5, 6, 7, 11, 12])
def test_a_header_across_the_end_of_the_buffer_is_read(shared_listener, before):
    listener, inbox = shared_listener
    largest = 131072 - 12  # bytes of a value whose PDU is an eighth of the buffer
    sizes = [largest] * (BUFFER // 131072 - 1) + [
        largest - before,
        1000,
    ]  # the headers after the last one lie at the end of the buffer
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        scu.start_store(DX, UID)
        assert wait_for(lambda: file_names(inbox))  # the command is read, the buffer empty
        at = 0
        wire = b""
        for size in [*sizes, *[largest] * 100]:
            piece = DATA[at : at + size]
            at += len(piece)
            wire += p_data(pdv(1, LAST if at == len(DATA) else 0, piece))
            if at == len(DATA):
                break
        scu.send(wire)
        assert scu.status() == 0
    (path,) = inbox.waiting()
    assert path.read_bytes().endswith(DATA)
    path.unlink()


def test_echo_and_images_share_an_association(node):
    listener, inbox = node()
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE), (VERIFICATION, IMPLICIT)])
        for _ in range(3):
            assert scu.echo(context=3) == 0
            assert scu.store(DATA, DX, UID) == 0
        assert scu.release()
    assert len(inbox.waiting()) == 3


def test_requests_sent_before_the_answer_are_answered_in_order(node):
    listener, inbox = node()
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE), (VERIFICATION, IMPLICIT)])
        scu.start_store(DX, UID)
        scu.send_data(DATA)
        scu.start_store(DX, "1.2.3")
        scu.send_data(DATA)
        scu.send(p_data(pdv(3, COMMAND, command(0x30, VERIFICATION, has_data=False))))
        assert [scu.status(), scu.status(), scu.status()] == [0, 0xA900, 0]
        assert scu.release()
    assert len(inbox.waiting()) == 1


def test_every_message_of_one_pdu_is_answered(node):
    listener, inbox = node()
    echo = pdv(3, COMMAND, command(0x30, VERIFICATION, has_data=False))
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE), (VERIFICATION, IMPLICIT)])
        scu.send(p_data(echo + echo + pdv(1, COMMAND, command(1, DX, "1.2.3")) + pdv(1, LAST, b"no image") + echo))
        assert sorted(scu.status() for _ in range(4)) == [0, 0, 0, 0xC000]
        assert scu.release()
    assert inbox.waiting() == []


OUT_OF_TURN = {
    "data without a command": pdv(1, LAST, b"abc"),
    "a command within a data set": pdv(1, COMMAND, command(1, DX, UID)) + pdv(1, COMMAND, command(1, DX, UID)),
    "data of another context": pdv(1, COMMAND, command(1, DX, UID)) + pdv(3, LAST, DATA[:100]),
    "a command that is no command": pdv(1, COMMAND, b"\1\2\3"),
    "a context that was not accepted": pdv(99, COMMAND, command(1, DX, UID)),
    "a value longer than its PDU": struct.pack(">LBB", 500, 1, 0) + b"abc",
    "a value of no length": struct.pack(">LBB", 0, 1, 0),
    "bytes after the last value": pdv(1, COMMAND, command(1, DX, UID)) + b"\0\0",
    "a command without end": pdv(1, 1, b"\0" * 65_000) + pdv(1, 1, b"\0" * 65_000),
}


@pytest.mark.parametrize("name", OUT_OF_TURN)
def test_presentation_data_values_out_of_order_are_aborted_by_the_provider(node, name):
    listener, inbox = node()
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE), (DX, EXPLICIT_LE)])
        scu.send(p_data(OUT_OF_TURN[name]))
        kind, rest = scu.receive() or (0, b"")
        assert (kind, rest[2]) == (A_ABORT, 2)
        assert scu.closed_within(3)
    assert wait_for(lambda: file_names(inbox) == [])
    assert answers_echo(listener.port)


def test_a_message_for_the_library_has_a_size_limit_too(node):
    listener, _ = node()
    with Scu(listener.port) as scu:
        scu.associate([(VERIFICATION, IMPLICIT)])
        scu.send(p_data(pdv(1, COMMAND, command(0x20, VERIFICATION))))  # an endless C-FIND
        with suppress(OSError):  # once the node has closed the connection; until then it discards the rest
            for _ in range(200):
                scu.send(p_data(pdv(1, 0, b"x" * 100_000)))
        assert scu.closed_within(10)
    assert listener.refusals.totals == {"unfinished": 1}
    assert answers_echo(listener.port)


def test_an_internal_error_ends_one_association_and_is_logged_without_values(node, caplog, monkeypatch):
    listener, inbox = node()
    monkeypatch.setattr("dicom.node.reception.store_status", lambda *_: {}["DOE^JANE"])
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        assert scu.store(DATA, DX, UID) is None
    assert wait_for(lambda: "KeyError in test_pdu_reader.py" in caplog.text)
    assert "DOE" not in caplog.text
    assert file_names(inbox) == []
    assert answers_echo(listener.port)
