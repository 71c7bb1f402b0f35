"""What a peer may write into its A-ASSOCIATE-RQ and its commands: ignored, refused or served, and no thread dies of it."""

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
    associate_rq,
    command,
    echoes,
    item,
)

ECHO = [(VERIFICATION, IMPLICIT)]


@pytest.fixture
def port(tmp_path, monkeypatch):
    """A listener with two seats, in which no thread may die."""
    died = []
    monkeypatch.setattr("threading.excepthook", died.append)
    listener = Listener(Node(port=0, max_associations=2), Inbox(tmp_path / "inbox", 0))
    listener.start()
    yield listener.port
    well = wait_for(lambda: echoes(listener.port))
    listener.stop()
    assert (well, died) == (True, [])


def changed(body, extra=b"", old=b"", new=b""):
    """A request with `extra` at its end, which is in the user information, and `old` replaced."""
    end = associate_rq(ECHO).rindex(item(0x50, b"")[:2])
    whole = body[6:end] + item(0x50, body[end + 4 :] + extra)
    whole = whole.replace(old, new) if old else whole
    return struct.pack(">BxL", 1, len(whole)) + whole


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
        scu.say(request_bytes)
        assert scu.hear()[0] == A_ASSOCIATE_AC
        assert scu.echo() == 0


def test_another_application_context_is_told_so(port):
    with Scu(port) as scu:
        scu.say(changed(associate_rq(ECHO), old=b"1.2.840.10008.3.1.1.1", new=b"1.2.840.10008.3.1.1.2"))
        assert scu.hear() == (A_ASSOCIATE_RJ, bytes([0, 1, 1, 2]))


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
def test_what_is_no_request_is_an_abort_at_once_and_costs_no_seat(port, old, new):
    body = associate_rq(ECHO)[6:]
    assert old in body
    if len(old) > 16 and not new:  # the context's own length shrinks too
        body = body.replace(struct.pack(">BxH", 0x20, 46), struct.pack(">BxH", 0x20, 46 - len(old)))
    body = body.replace(old, new)
    for _ in range(3):
        with Scu(port) as scu:
            scu.say(struct.pack(">BxL", 1, len(body)) + body)
            assert scu.hear()[0] == A_ABORT
            assert scu.ends(5)


@pytest.mark.parametrize("field", [0x7777, 0x0000, 0x0FF0, 0xFFFF])
def test_a_command_that_does_not_exist_is_an_abort_and_costs_no_seat(port, field):
    for _ in range(3):
        with Scu(port) as scu:
            assert scu.associate(ECHO) == A_ASSOCIATE_AC
            scu.say(p_data(pdv(1, COMMAND, command(field, VERIFICATION, has_data=False))))
            assert scu.hear() == (A_ABORT, bytes([0, 0, 2, 6]))


@pytest.mark.parametrize("field", sorted(NEEDED))
def test_a_request_without_what_it_needs_is_an_abort_and_not_a_silence(port, field):
    with Scu(port) as scu:
        assert scu.associate([(COMPUTED_RADIOGRAPHY, IMPLICIT)]) == A_ASSOCIATE_AC
        bare = struct.pack("<HHLH", 0, 0x0100, 2, field) + struct.pack("<HHLH", 0, 0x0800, 2, 0x0101)
        scu.say(p_data(pdv(1, COMMAND, bare)))
        assert scu.hear() == (A_ABORT, bytes([0, 0, 2, 6]))


def test_a_request_that_can_not_be_read_is_counted(tmp_path):
    listener = Listener(Node(port=0), Inbox(tmp_path / "inbox", 0))
    listener.start()
    with Scu(listener.port) as scu:
        assert scu.associate(ECHO, calling="A\\B") == A_ABORT
    assert wait_for(lambda: listener.refusals.totals == {"unfinished": 1})
    listener.stop()


def test_a_peer_in_whose_pdus_no_answer_fits_is_an_abort_at_once(port):
    with Scu(port) as scu:
        scu.say(changed(associate_rq(ECHO), old=struct.pack(">L", 131072), new=struct.pack(">L", 6)))
        assert scu.hear()[0] == A_ABORT
        assert scu.ends(5)


def test_no_answer_is_longer_than_the_peer_takes(port):
    pdus = []
    with Scu(port) as scu:
        scu.say(associate_rq([(COMPUTED_RADIOGRAPHY, IMPLICIT)]).replace(struct.pack(">L", 131072), b"\0\0\0\x32"))
        assert scu.hear()[0] == A_ASSOCIATE_AC
        scu.begin(COMPUTED_RADIOGRAPHY, "1.2.3")
        scu.data(b"not an image")
        while not pdus or not pdus[-1][5] & IS_LAST:
            pdus.append(scu.hear()[1])
    assert max(len(pdu) for pdu in pdus) == 50
    assert struct.pack("<HHLH", 0, 0x0900, 2, 0xC000) in b"".join(pdu[6:] for pdu in pdus)


def test_an_abort_of_ours_is_counted_also_where_no_object_was_on_its_way(tmp_path):
    listener = Listener(Node(port=0), Inbox(tmp_path / "inbox", 0))
    listener.start()
    with Scu(listener.port) as scu:
        assert scu.associate(ECHO) == A_ASSOCIATE_AC
        scu.say(p_data(pdv(1, COMMAND, command(0x7777, VERIFICATION, has_data=False))))
        assert scu.hear()[0] == A_ABORT
    assert wait_for(lambda: listener.refusals.totals == {"unfinished": 1})
    listener.stop()


def test_a_message_id_of_four_bytes_is_none():
    four = struct.pack("<HHLL", 0, 0x0110, 4, 7)
    two = struct.pack("<HHLH", 0, 0x0110, 2, 7)
    for message, missing in ((four, True), (two, False)):
        head = struct.pack("<HHLH", 0, 0x0100, 2, 1)
        found = parse(head + message + struct.pack("<HHLH", 0, 0x0800, 2, 0))
        assert bool(found.missing) == missing
