"""Unusual A-ASSOCIATE-RQs and commands are ignored, refused or served, and no thread ends with an exception."""

import struct

import pytest

from dicom.dataset.facts import COMPUTED_RADIOGRAPHY
from dicom.node.dimse_command import IS_LAST, NEEDED, p_data, parse, pdv
from dicom.node.listener import Listener, Node
from dicom.store.inbox import Inbox
from tests.support.dicom.pacs import wait_for
from tests.support.dicom.raw_scu import (
    A_ABORT,
    A_ASSOCIATE_AC,
    A_ASSOCIATE_RJ,
    COMMAND,
    IMPLICIT,
    VERIFICATION,
    Scu,
    answers_echo,
    associate_rq,
    command,
    item,
)

ECHO = [(VERIFICATION, IMPLICIT)]


@pytest.fixture
def port(tmp_path, monkeypatch):
    """Yield the port of a listener with two associations; fails if a thread ends with an exception."""
    died = []
    monkeypatch.setattr("threading.excepthook", died.append)
    listener = Listener(Node(port=0, max_associations=2), Inbox(tmp_path / "inbox", 0))
    listener.start()
    yield listener.port
    answers = wait_for(lambda: answers_echo(listener.port))
    listener.stop()
    assert (answers, died) == (True, [])


def changed(body, extra=b"", old=b"", new=b""):
    """Return a request with `extra` at the end of its user information, and `old` replaced by `new`."""
    end = associate_rq(ECHO).rindex(item(0x50, b"")[:2])
    body_and_items = body[6:end] + item(0x50, body[end + 4 :] + extra)
    body_and_items = body_and_items.replace(old, new) if old else body_and_items
    return struct.pack(">BxL", 1, len(body_and_items)) + body_and_items


@pytest.mark.parametrize(
    "request_bytes",
    [
        changed(associate_rq(ECHO), extra=item(0x7F, b"who knows")),
        changed(associate_rq(ECHO), extra=item(0x10, b"")),
        changed(associate_rq(ECHO, called="CXRLOOP\0\0\0", calling="SCU\0\0")),
        changed(associate_rq(ECHO))[:6] + b"\0\3" + changed(associate_rq(ECHO))[8:],
        changed(associate_rq(ECHO), old=item(0x51, struct.pack(">L", 131072)), new=item(0x7F, bytes(4))),
        changed(associate_rq(ECHO), extra=item(0x58, struct.pack(">BBH4sH", 6, 1, 4, b"else", 0))),
        changed(associate_rq(ECHO), extra=item(0x55, b"a name of more than 16 characters")),
        changed(associate_rq(ECHO), extra=item(0x55, b"R\xf6ntgen")),
        changed(associate_rq(ECHO), extra=item(0x54, struct.pack(">H17sBB", 17, VERIFICATION.encode(), 7, 9))),
    ],
    ids=[
        "an unknown sub-item",
        "an item in the wrong place",
        "titles padded with NUL",
        "a later version too",
        "no maximum length",
        "an identity of a later edition",
        "a long version name",
        "a version name beyond ASCII",
        "a role that is none",
    ],
)
def test_what_the_standard_says_to_ignore_is_ignored(port, request_bytes):
    with Scu(port) as scu:
        scu.send(request_bytes)
        assert scu.receive()[0] == A_ASSOCIATE_AC
        assert scu.echo() == 0


def test_another_application_context_is_rejected_with_1_1_2(port):
    with Scu(port) as scu:
        scu.send(changed(associate_rq(ECHO), old=b"1.2.840.10008.3.1.1.1", new=b"1.2.840.10008.3.1.1.2"))
        assert scu.receive() == (A_ASSOCIATE_RJ, bytes([0, 1, 1, 2]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (item(0x40, IMPLICIT.encode()), b""),
        (struct.pack(">Bxxx", 1), struct.pack(">Bxxx", 2)),
        (b"CXRLOOP".ljust(16), b" " * 16),
        (item(0x52, b"1.2.3"), b"\x52\0\xff\xff1.2.3"),
    ],
    ids=["a context without transfer syntax", "an even context ID", "an empty title", "an item longer than the rest"],
)
def test_a_malformed_request_is_aborted_at_once_and_does_not_count_as_an_association(port, old, new):
    body = associate_rq(ECHO)[6:]
    assert old in body
    if len(old) > 16 and not new:  # the length of the context shrinks too
        body = body.replace(struct.pack(">BxH", 0x20, 46), struct.pack(">BxH", 0x20, 46 - len(old)))
    body = body.replace(old, new)
    for _ in range(3):
        with Scu(port) as scu:
            scu.send(struct.pack(">BxL", 1, len(body)) + body)
            assert scu.receive()[0] == A_ABORT
            assert scu.closed_within(5)


@pytest.mark.parametrize("field", [0x7777, 0x0000, 0x0FF0, 0xFFFF])
def test_an_unknown_command_is_aborted_and_does_not_count_as_an_association(port, field):
    for _ in range(3):
        with Scu(port) as scu:
            assert scu.associate(ECHO) == A_ASSOCIATE_AC
            scu.send(p_data(pdv(1, COMMAND, command(field, VERIFICATION, has_data=False))))
            assert scu.receive() == (A_ABORT, bytes([0, 0, 2, 6]))


@pytest.mark.parametrize("field", sorted(NEEDED))
def test_a_request_without_a_required_element_is_aborted(port, field):
    with Scu(port) as scu:
        assert scu.associate([(COMPUTED_RADIOGRAPHY, IMPLICIT)]) == A_ASSOCIATE_AC
        bare = struct.pack("<HHLH", 0, 0x0100, 2, field) + struct.pack("<HHLH", 0, 0x0800, 2, 0x0101)
        scu.send(p_data(pdv(1, COMMAND, bare)))
        assert scu.receive() == (A_ABORT, bytes([0, 0, 2, 6]))


def test_an_unreadable_association_request_is_counted(tmp_path):
    listener = Listener(Node(port=0), Inbox(tmp_path / "inbox", 0))
    listener.start()
    with Scu(listener.port) as scu:
        assert scu.associate(ECHO, calling="A\\B") == A_ABORT
    assert wait_for(lambda: listener.refusals.totals == {"unfinished": 1})
    listener.stop()


def test_a_peer_with_a_too_small_maximum_length_is_aborted_at_once(port):
    with Scu(port) as scu:
        scu.send(changed(associate_rq(ECHO), old=struct.pack(">L", 131072), new=struct.pack(">L", 6)))
        assert scu.receive()[0] == A_ABORT
        assert scu.closed_within(5)


def test_no_answer_exceeds_the_maximum_length_of_the_peer(port):
    pdus = []
    with Scu(port) as scu:
        scu.send(associate_rq([(COMPUTED_RADIOGRAPHY, IMPLICIT)]).replace(struct.pack(">L", 131072), b"\0\0\0\x32"))
        assert scu.receive()[0] == A_ASSOCIATE_AC
        scu.start_store(COMPUTED_RADIOGRAPHY, "1.2.3")
        scu.send_data(b"not an image")
        while not pdus or not pdus[-1][5] & IS_LAST:
            pdus.append(scu.receive()[1])
    assert max(len(pdu) for pdu in pdus) == 50
    assert struct.pack("<HHLH", 0, 0x0900, 2, 0xC000) in b"".join(pdu[6:] for pdu in pdus)


def test_our_abort_is_counted_also_without_an_object_in_transfer(tmp_path):
    listener = Listener(Node(port=0), Inbox(tmp_path / "inbox", 0))
    listener.start()
    with Scu(listener.port) as scu:
        assert scu.associate(ECHO) == A_ASSOCIATE_AC
        scu.send(p_data(pdv(1, COMMAND, command(0x7777, VERIFICATION, has_data=False))))
        assert scu.receive()[0] == A_ABORT
    assert wait_for(lambda: listener.refusals.totals == {"unfinished": 1})
    listener.stop()


def test_a_message_id_of_four_bytes_counts_as_missing():
    four = struct.pack("<HHLL", 0, 0x0110, 4, 7)
    two = struct.pack("<HHLH", 0, 0x0110, 2, 7)
    for message, missing in ((four, True), (two, False)):
        head = struct.pack("<HHLH", 0, 0x0100, 2, 1)
        parsed = parse(head + message + struct.pack("<HHLH", 0, 0x0800, 2, 0))
        assert bool(parsed.missing) == missing
