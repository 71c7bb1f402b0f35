"""Hostile senders on the port: each object gets its status, the association lives, and nothing is left."""

import socket
import struct
import time
import zlib

import pytest
from pacs import associate, data_set, film, store_raw, wait_for

from dicom import reception
from dicom.image import COMPUTED_RADIOGRAPHY, DIGITAL_XRAY_PRESENTATION
from dicom.inbox import Inbox
from dicom.listener import Listener, Node
from dicom.part10 import DEFLATED_LE, EXPLICIT_LE, IMPLICIT_LE
from dicom.sender import echo
from dicom.syntaxes import JPEG_2000_LOSSLESS, JPEG_LS

DX = DIGITAL_XRAY_PRESENTATION


@pytest.fixture
def node(tmp_path):
    """A listener and its inbox; more arguments by `start`."""
    running = []

    def start(**settings):
        inbox = Inbox(tmp_path / "inbox", settings.pop("min_free_bytes", 0))
        listener = Listener(Node(port=0, **settings), inbox)
        listener.start()
        running.append(listener)
        return listener, inbox

    yield start
    for listener in running:
        listener.stop()


def everything(inbox):
    return sorted(path.name for path in inbox.folder.rglob("*") if path.is_file())


GOOD = film()
DATA, UID, STUDY = data_set(GOOD), str(GOOD.SOPInstanceUID), b"\x20\x00\x0d\x00UI"
ENGINE = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
BOMB = b"".join(ENGINE.compress(b"\0" * (1 << 20)) for _ in range(300)) + ENGINE.flush()


def without_uid():
    ds = film()
    del ds.SOPInstanceUID
    ds.file_meta.MediaStorageSOPInstanceUID = UID
    return data_set(ds)


HOSTILE = {
    "command of another class": (DATA, UID, COMPUTED_RADIOGRAPHY, EXPLICIT_LE, reception.MISMATCH),
    "command of another instance": (DATA, "1.2.3.4", DX, EXPLICIT_LE, reception.MISMATCH),
    "a path as UID": (DATA, "../../../../tmp/x", DX, EXPLICIT_LE, reception.INVALID_INSTANCE),
    "an absolute path as UID": (DATA, "/etc/passwd", DX, EXPLICIT_LE, reception.INVALID_INSTANCE),
    "letters and blanks as UID": (DATA, "1.2 3.abc", DX, EXPLICIT_LE, reception.INVALID_INSTANCE),
    "no instance UID in the data set": (without_uid(), UID, DX, EXPLICIT_LE, reception.NOT_UNDERSTOOD),
    "random bytes": (bytes(range(1, 255)) * 40, UID, DX, EXPLICIT_LE, reception.NOT_UNDERSTOOD),
    "implicit under explicit": (data_set(film(transfer_syntax=IMPLICIT_LE)), UID, DX, EXPLICIT_LE, 0xC000),
    "native pixels under JPEG 2000": (DATA, UID, DX, JPEG_2000_LOSSLESS, reception.NOT_UNDERSTOOD),
    "code stream under explicit": (data_set(film(transfer_syntax=JPEG_LS)), UID, DX, EXPLICIT_LE, 0xC000),
    "pixels cut short": (DATA[:-500], UID, DX, EXPLICIT_LE, reception.NOT_UNDERSTOOD),
    "header cut short": (DATA[:200], UID, DX, EXPLICIT_LE, reception.NOT_UNDERSTOOD),
    "code stream cut short": (data_set(film(transfer_syntax=JPEG_LS))[:-40], UID, DX, JPEG_LS, 0xC000),
    "deflate bomb": (BOMB, UID, DX, DEFLATED_LE, reception.NOT_UNDERSTOOD),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_objects_get_their_status_keep_the_association_and_leave_nothing(node, name):
    listener, inbox = node()
    data, uid, sop_class, syntax, status = HOSTILE[name]
    association = associate(listener.port, [(sop_class, syntax), (DX, EXPLICIT_LE)])
    assert store_raw(association, data, uid, sop_class, 1) == status
    assert association.is_established
    assert everything(inbox) == []
    assert store_raw(association, DATA, UID, DX, 3) == 0
    association.release()


def fragments(port, *parts):
    """A C-STORE command and then data set fragments (control header, bytes), on the raw socket."""
    association = associate(port, [(DX, EXPLICIT_LE)])
    association._reactor_checkpoint.clear()  # the answer is the test's, not the library's loop's
    assert wait_for(lambda: association._is_paused)
    wire = association.dul.socket.socket
    element = lambda tag, data: struct.pack("<HHL", 0, tag, len(data)) + data  # noqa: E731
    even = lambda text: text.encode() + b"\0" * (len(text) % 2)  # noqa: E731
    command = element(0x0002, even(DX)) + element(0x0100, b"\1\0") + element(0x0110, b"\1\0")
    command += element(0x0700, b"\0\0") + element(0x0800, b"\1\0") + element(0x1000, even(UID))
    command = element(0, struct.pack("<L", len(command))) + command
    for control, data in ((3, command), *parts):
        item = struct.pack(">LBB", len(data) + 2, 1, control) + data
        wire.sendall(struct.pack(">BBL", 4, 0, len(item)) + item)
    return association, wire


def partial_store(port):
    association, wire = fragments(port, (0, DATA[:4000]))
    association._reactor_checkpoint.set()
    time.sleep(0.2)
    return association, wire


def test_an_empty_object_is_not_understood(node):
    listener, inbox = node()
    association, _ = fragments(listener.port, (2, b""))
    _, response = association.dimse.get_msg(block=True)
    association._reactor_checkpoint.set()
    assert response.Status == reception.NOT_UNDERSTOOD
    association.release()
    assert everything(inbox) == []


def test_fragments_of_odd_and_empty_sizes_are_one_object(node):
    listener, inbox = node()
    association, _ = fragments(listener.port, (0, DATA[:1]), (0, b""), (0, DATA[1:7000]), (2, DATA[7000:]))
    _, response = association.dimse.get_msg(block=True)
    association._reactor_checkpoint.set()
    assert response.Status == 0
    association.release()
    assert inbox.waiting()[0].read_bytes().endswith(DATA)


def test_a_line_that_drops_in_the_middle_of_a_film_leaves_nothing(node):
    listener, inbox = node()
    _, wire = partial_store(listener.port)
    wire.shutdown(socket.SHUT_RDWR)
    wire.close()
    time.sleep(0.3)
    assert everything(inbox) == []
    assert echo("127.0.0.1", listener.port, "CXRLOOP")


def test_an_abort_in_the_middle_of_a_film_leaves_nothing(node):
    listener, inbox = node()
    association, _ = partial_store(listener.port)
    association.abort()
    time.sleep(0.3)
    assert everything(inbox) == []
    assert echo("127.0.0.1", listener.port, "CXRLOOP")


@pytest.mark.parametrize(
    "noise", [b"GET / HTTP/1.1\r\n\r\n", b"\x01\x00\xff\xff\xff\xff" + b"x" * 100, b"\x99" * 500, b""]
)
def test_garbage_on_the_line_stops_nobody(node, noise):
    listener, inbox = node()
    with socket.create_connection(("127.0.0.1", listener.port)) as wire:
        wire.sendall(noise)
        assert echo("127.0.0.1", listener.port, "CXRLOOP")
    assert everything(inbox) == []


def test_thirty_idle_connections_stop_nobody(node):
    listener, _ = node(max_associations=40)
    idle = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(30)]
    assert echo("127.0.0.1", listener.port, "CXRLOOP")
    for wire in idle:
        wire.close()
