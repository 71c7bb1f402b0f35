"""The sender: unchanged bytes, and a status for each item."""

import threading
import time

import pytest
from pynetdicom import evt
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import C_STORE_RSP

from dicom.client.sender import NO_ASSOCIATION, NO_CONTEXT, UNREADABLE, deliver, echo, send
from dicom.dataset.part10 import EXPLICIT_LE, IMPLICIT_LE
from dicom.dataset.syntaxes import JPEG_2000_LOSSLESS, JPEG_LS
from dicom.node.listener import Listener, Node
from dicom.store.inbox import Inbox
from tests.support.dicom.pacs import save, xray
from tests.support.dicom.storage_scp import Archive
from tests.support.ports import free_port


@pytest.fixture
def node(tmp_path):
    listener = Listener(Node(port=0), Inbox(tmp_path / "inbox", 0))
    listener.start()
    yield listener, Inbox(tmp_path / "inbox", 0)
    listener.stop()


def test_files_and_data_sets_of_mixed_syntaxes_arrive_byte_for_byte(tmp_path, node):
    listener, inbox = node
    syntaxes = (EXPLICIT_LE, JPEG_LS, IMPLICIT_LE, JPEG_2000_LOSSLESS, EXPLICIT_LE)
    items = [save(xray(n, transfer_syntax=syntax), tmp_path / f"{n}.dcm") for n, syntax in enumerate(syntaxes)]
    results = list(send([*items, xray(9)], "127.0.0.1", listener.port, "CXRLOOP"))
    assert [status for _, status in results] == [0] * 6
    assert [item for item, _ in results][:5] == items
    arrived = {path.read_bytes()[-3000:] for path in inbox.waiting()}
    assert {path.read_bytes()[-3000:] for path in items} <= arrived


def test_an_unreadable_or_refused_item_has_no_status_and_the_next_is_sent(tmp_path, node):
    listener, inbox = node
    broken = tmp_path / "broken.dcm"
    broken.write_bytes(b"not DICOM")
    ct = xray(1)
    ct.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    results = list(send([broken, tmp_path / "gone.dcm", ct, xray(2)], "127.0.0.1", listener.port, "CXRLOOP"))
    assert [status for _, status in results] == [None, None, None, 0]
    assert len(inbox.waiting()) == 1


def test_without_a_peer_nothing_is_sent():
    port = free_port()
    assert not echo("127.0.0.1", port, "CXRLOOP")
    assert [status for _, status in send([xray()], "127.0.0.1", port, "CXRLOOP")] == [None]


def test_results_come_while_sending(node):
    listener, inbox = node
    sending = send((xray(n) for n in range(3)), "127.0.0.1", listener.port, "CXRLOOP")
    assert next(sending)[1] == 0
    assert len(inbox.waiting()) == 1
    assert [status for _, status in sending] == [0, 0]


def test_each_item_without_status_has_a_reason(tmp_path, node):
    listener, _ = node
    ct = xray(1)
    ct.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    odd = xray(3)
    odd["Rows"].value = "many"  # cannot be encoded
    results = [
        sent.why for sent in deliver([tmp_path / "gone.dcm", odd, ct, xray(2)], "127.0.0.1", listener.port, "CXRLOOP")
    ]
    assert results == [UNREADABLE, UNREADABLE, NO_CONTEXT, ""]
    assert [sent.why for sent in deliver([xray(1)], "127.0.0.1", listener.port, "WRONG")] == [NO_ASSOCIATION]
    assert [sent.why for sent in deliver([xray(1)], "127.0.0.1", free_port(), "CXRLOOP")] == [NO_ASSOCIATION]


def test_kinds_given_in_advance_use_one_association():
    images = [xray(n, transfer_syntax=syntax) for n, syntax in enumerate((EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_LE))]
    kinds = [(images[0].SOPClassUID, EXPLICIT_LE), (images[0].SOPClassUID, IMPLICIT_LE)]
    with Archive(free_port(), classes=(images[0].SOPClassUID,)) as archive:
        sent = list(deliver(images, "127.0.0.1", archive.port, "PACS", kinds=kinds))
        assert [result.status for result in sent] == [0, 0, 0]
        assert archive.associations == 1
        list(deliver(images, "127.0.0.1", archive.port, "PACS"))
        assert archive.associations == 3  # one more for the second syntax


def test_after_an_abort_by_the_peer_the_next_item_uses_a_new_association():
    with Archive(free_port(), classes=(xray(0).SOPClassUID,)) as archive:

        def hang_up(event):
            if isinstance(event.message, C_STORE_RSP):
                threading.Timer(0.05, event.assoc.abort).start()

        archive.server.bind(evt.EVT_DIMSE_SENT, hang_up)
        results = []
        for sent in deliver((xray(n) for n in range(6)), "127.0.0.1", archive.port, "PACS"):
            results.append(sent.status)
            time.sleep(0.3)  # the abort arrives
        assert results == [0] * 6
        assert archive.associations == 6


def test_no_answer_is_lost_to_the_reactor_thread(monkeypatch):
    """The reactor thread, delayed between its checkpoint and the queue, would otherwise take answers."""
    real = DIMSEServiceProvider.get_msg

    def slow(provider, block=False):
        if not block:
            time.sleep(0.02)
        return real(provider, block)

    with Archive(free_port(), classes=(xray(0).SOPClassUID,)) as archive:
        monkeypatch.setattr(DIMSEServiceProvider, "get_msg", slow)
        statuses = [sent.status for sent in deliver((xray(n) for n in range(20)), "127.0.0.1", archive.port, "PACS")]
        assert statuses == [0] * 20
        assert archive.associations == 1
