"""The listener: real associations over real sockets, allow lists, limits, stopping and log lines."""

import logging
import threading
import time

import pytest
from pydicom import dcmread
from pydicom.uid import generate_uid

from dicom.client.sender import echo, send
from dicom.dataset.facts import DIGITAL_XRAY_PRESENTATION, SOP_CLASSES
from dicom.dataset.part10 import DEFLATED_LE, EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE
from dicom.dataset.syntaxes import JPEG_2000_LOSSLESS, JPEG_LS, SYNTAXES
from dicom.intake.examine import Admission, examine
from dicom.node.listener import Listener, Node
from dicom.store.inbox import Inbox
from tests.support.dicom.pacs import KEY, associate, data_set, send_once, wait_for, xray

DX = DIGITAL_XRAY_PRESENTATION


@pytest.fixture
def node(tmp_path):
    """Return a function that starts a listener with these settings and returns (listener, inbox)."""
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


def file_names(inbox):
    return sorted(path.name for path in inbox.folder.rglob("*") if path.is_file())


# Echo and storage


def test_echo_is_answered(node):
    listener, _ = node()
    assert echo("127.0.0.1", listener.port, "CXRLOOP")


@pytest.mark.parametrize("syntax", [EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE, DEFLATED_LE, JPEG_LS, JPEG_2000_LOSSLESS])
def test_an_image_arrives_as_it_was_sent(node, syntax):
    listener, inbox = node()
    ds = xray(bits=12, transfer_syntax=syntax)
    assert send_once(listener.port, data_set(ds), ds.SOPInstanceUID, DX, syntax) == 0
    (path,) = inbox.waiting()
    assert path.read_bytes().endswith(data_set(ds))
    assert dcmread(path).file_meta.TransferSyntaxUID == syntax
    assert examine(path, KEY, Admission()).outcome == "admitted"


def test_every_class_and_syntax_of_ours_is_accepted_and_nothing_else(node):
    listener, _ = node()
    kinds = [(sop_class, syntax) for sop_class in SOP_CLASSES for syntax in SYNTAXES]
    association = associate(listener.port, kinds)
    assert len(association.accepted_contexts) == len(kinds)
    association.release()
    ct, mpeg2 = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.4.100"
    association = associate(listener.port, [(ct, EXPLICIT_LE), (DX, mpeg2), (DX, EXPLICIT_LE)])
    assert [context.result for context in association.rejected_contexts] == [3, 4]
    association.release()


def test_an_image_is_acknowledged_only_after_it_is_in_the_inbox(node):
    listener, inbox = node()
    for n, (_, status) in enumerate(send([xray(n) for n in range(5)], "127.0.0.1", listener.port, "CXRLOOP"), 1):
        assert status == 0
        assert len(inbox.waiting()) == n


def test_the_same_image_twice_is_two_successes(node):
    listener, inbox = node()
    statuses = [status for _, status in send([xray(), xray()], "127.0.0.1", listener.port, "CXRLOOP")]
    assert statuses == [0, 0]
    assert len(inbox.waiting()) == 2


def test_an_image_that_is_not_a_chest_is_stored_and_the_intake_decides(node):
    listener, inbox = node()
    knee, bare = xray(1, body_part="KNEE"), xray(2)
    del bare.PixelData
    assert [status for _, status in send([knee, bare], "127.0.0.1", listener.port, "CXRLOOP")] == [0, 0]
    outcomes = [examine(path, KEY, Admission()).outcome for path in inbox.waiting()]
    assert outcomes == ["rejected", "quarantined"]


def test_many_senders_at_once_lose_nothing(node):
    listener, inbox = node()
    sent: list[str] = []

    def modality(first):
        images = [xray(n, side=200) for n in range(first, first + 6)]
        sent.extend(
            ds.SOPInstanceUID for ds, status in send(images, "127.0.0.1", listener.port, "CXRLOOP") if status == 0
        )

    threads = [threading.Thread(target=modality, args=(100 * n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sent) == 30
    assert {dcmread(path).SOPInstanceUID for path in inbox.waiting()} == set(sent)


# Allow lists and limits


def test_another_called_title_is_rejected(node):
    listener, _ = node(aet="WARD3")
    assert not echo("127.0.0.1", listener.port, "CXRLOOP")
    assert echo("127.0.0.1", listener.port, "WARD3")


def test_only_calling_titles_on_the_list_are_accepted(node):
    listener, _ = node(allow_aet=("CR1", "CR2"))
    assert not echo("127.0.0.1", listener.port, "CXRLOOP", "CR3")
    assert echo("127.0.0.1", listener.port, "CXRLOOP", "CR2")


def test_only_addresses_on_the_list_are_accepted(node):
    listener, _ = node(allow_ip=("10.0.0.0/8", "192.168.1.7"))
    assert not echo("127.0.0.1", listener.port, "CXRLOOP")
    listener, _ = node(allow_ip=("127.0.0.0/8",))
    assert echo("127.0.0.1", listener.port, "CXRLOOP")


def test_associations_over_the_limit_are_rejected_until_others_end(node):
    listener, _ = node(max_associations=2)
    associations = [associate(listener.port, [(DX, EXPLICIT_LE)]) for _ in range(2)]
    assert all(association.is_established for association in associations)
    assert associate(listener.port, [(DX, EXPLICIT_LE)]).is_rejected
    for association in associations:
        association.release()
    assert wait_for(lambda: echo("127.0.0.1", listener.port, "CXRLOOP"))


def test_a_malformed_address_list_is_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match="not-an-ip"):
        Listener(Node(allow_ip=("not-an-ip",)), Inbox(tmp_path))


# Stopping, and the log


def test_stopping_frees_the_port_within_seconds(tmp_path):
    listener = Listener(Node(port=0), Inbox(tmp_path, 0))
    listener.start()
    port = listener.port
    associate(port, [(DX, EXPLICIT_LE)])
    began = time.monotonic()
    listener.stop()
    assert time.monotonic() - began < 8
    second = Listener(Node(port=port), Inbox(tmp_path, 0))
    second.start()
    assert echo("127.0.0.1", port, "CXRLOOP")
    second.stop()


def test_logs_name_files_and_peers_and_no_patient(node, caplog):
    caplog.set_level(logging.DEBUG)
    listener, inbox = node()
    ds = xray(patient_id="PATIENT-4711")
    ds.PatientName = "DOE^JANE"
    send_once(listener.port, data_set(ds), ds.SOPInstanceUID, DX)
    send_once(listener.port, data_set(ds)[:-10], ds.SOPInstanceUID, DX)
    send_once(listener.port, data_set(ds), generate_uid(), DX)
    (path,) = inbox.waiting()
    assert path.name in caplog.text
    for private in ("4711", "DOE", ds.SOPInstanceUID, ds.StudyInstanceUID):
        assert private not in caplog.text
