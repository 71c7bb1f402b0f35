"""Faulty archives over real associations: filtered answers, limits, and the exception for each failure."""

import socket
import threading
import time
from datetime import date

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom import AE, build_context, evt

from dicom.client import archive
from dicom.client.archive import Query
from dicom.client.association import Peer
from dicom.client.dimse import FIND, GET, MOVE, Pacs
from dicom.dataset.part10 import EXPLICIT_LE
from dicom.errors import ArchiveBusy, ArchiveUnusable, ImageMissing
from dicom.node import tls
from dicom.store.inbox import Inbox
from tests.support.dicom.archive_queries import REQUESTED, running_listener
from tests.support.dicom.certificates import authority
from tests.support.dicom.pacs import xray
from tests.support.ports import free_port


@pytest.fixture
def node(tmp_path):
    with running_listener(tmp_path) as listening:
        yield listening


@pytest.fixture
def pacs():
    """Return a function that starts a PACS with handlers for C-FIND, C-GET and C-MOVE; it returns the port."""
    servers = []

    def start(find=None, get=None, move=None, models=(FIND, GET, MOVE), storage=True, **settings):
        entity = AE("PACS")
        entity.require_called_aet = True
        entity.maximum_pdu_size = 131072
        for name, value in settings.items():
            setattr(entity, name, value)
        for model in ("1.2.840.10008.1.1", *models):
            entity.add_supported_context(model)
        if storage:
            entity.add_supported_context(xray().SOPClassUID, EXPLICIT_LE, scu_role=True, scp_role=True)
        handlers = [(evt.EVT_C_FIND, find), (evt.EVT_C_GET, get), (evt.EVT_C_MOVE, move)]
        server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[pair for pair in handlers if pair[1]])
        servers.append(server)
        return server.socket.getsockname()[1]

    yield start
    for server in servers:
        server.shutdown()


def pacs_client(port, inbox=None, how="get", aet="PACS"):
    return Pacs(Peer(aet, "127.0.0.1", port), inbox, how)  # type: ignore[arg-type]


def answers(*pairs):
    """Return a C-FIND handler that sends these answers to every query."""

    def find(event):
        for pair in pairs:
            made = Dataset()
            made.QueryRetrieveLevel = event.identifier.QueryRetrieveLevel
            for keyword, value in pair.items():
                setattr(made, keyword, value)
            yield 0xFF00, made

    return find


def test_a_wrong_title_a_closed_port_and_an_unknown_host_have_their_own_messages(pacs):
    port = pacs(require_calling_aet=["SOMEBODY"])
    with pytest.raises(ArchiveUnusable, match="does not know our AE title CXRLOOP"):
        pacs_client(port).check_connection()
    with pytest.raises(ArchiveUnusable, match="does not have the AE title WRONG"):
        pacs_client(pacs(), aet="WRONG").check_connection()
    with pytest.raises(ArchiveBusy, match="does not answer: no program listens there"):
        pacs_client(free_port()).check_connection()
    with pytest.raises(ArchiveUnusable, match="the host name has no address"):
        Pacs(Peer("PACS", "no-such-host.invalid", 104), None, "get").check_connection()  # type: ignore[arg-type]


def test_an_archive_without_c_get_is_reported_with_advice(pacs):
    with pytest.raises(ArchiveUnusable, match=r"does not offer C-GET.*--how move"):
        pacs_client(pacs(models=(FIND, MOVE))).check_connection()
    pacs_client(pacs(models=(FIND, MOVE)), how="move").check_connection()


def test_an_archive_at_its_association_limit_is_busy(pacs):
    port = pacs(maximum_associations=1)
    with pacs_client(port).session(), pytest.raises(ArchiveBusy, match="limit"):
        pacs_client(port).check_connection()


def test_answers_of_an_archive_that_ignores_filters_are_filtered(pacs):
    day = {"StudyDate": "20260105", "ModalitiesInStudy": "CR"}
    port = pacs(
        answers(
            {"StudyInstanceUID": "1.1", "PatientID": "P1"} | day,
            {"StudyInstanceUID": "1.2", "PatientID": "P2"} | day,
            {"StudyInstanceUID": "1.3", "PatientID": "P1", "StudyDate": "20250105"},
            {"StudyInstanceUID": "1.4", "PatientID": "P1"} | day | {"ModalitiesInStudy": "MR"},
        )
    )
    query = Query(patient="P1", since=date(2026, 1, 1), until=date(2026, 12, 31))
    assert pacs_client(port).studies(query) == ([archive.Study("1.1", None)], True)


def test_an_endless_list_of_studies_is_cut_off(pacs, monkeypatch):
    monkeypatch.setattr("dicom.client.dimse.MAX_MATCHES", 50)

    def endless(event):
        n = 0
        while not event.assoc.is_aborted and n < 100_000:
            made = Dataset()
            made.QueryRetrieveLevel, made.StudyInstanceUID = "STUDY", f"1.2.{n}"
            n += 1
            yield 0xFF00, made

    studies, complete = pacs_client(pacs(endless)).studies(Query(study=""))
    assert (len(studies), complete) == (50, False)


@pytest.mark.parametrize(
    ("status", "error"), [(0xA700, ArchiveBusy), (0xA900, ArchiveUnusable), (0xC001, ArchiveUnusable)]
)
def test_each_c_find_failure_raises_its_exception(pacs, status, error):
    def find(event):
        yield status, None

    with pytest.raises(error, match=f"{status:04X}"):
        pacs_client(pacs(find)).studies(Query())


def gets(*images, status=0x0000):
    def get(event):
        yield len(images)
        for image in images:
            yield 0xFF00, image
        yield status, None

    return get


def test_an_image_comes_by_get(pacs, tmp_path):
    inbox = Inbox(tmp_path, 0)
    with pacs_client(pacs(get=gets(xray())), inbox).session() as session:
        session.fetch(REQUESTED)
    assert dcmread(inbox.waiting()[0]).SOPInstanceUID == REQUESTED.sop_uid


def test_an_image_other_than_the_requested_one_is_refused(pacs, tmp_path):
    inbox = Inbox(tmp_path, 0)
    with (
        pacs_client(pacs(get=gets(xray(7))), inbox).session() as session,
        pytest.raises(ImageMissing, match="another image"),
    ):
        session.fetch(REQUESTED)
    assert inbox.waiting() == []


def test_a_success_without_an_image_is_a_failure(pacs, tmp_path):
    with (
        pacs_client(pacs(get=gets()), Inbox(tmp_path, 0)).session() as session,
        pytest.raises(ImageMissing, match="does not send it"),
    ):
        session.fetch(REQUESTED)


STATUSES = [(0xA701, ArchiveBusy), (0xA702, ArchiveBusy), (0xC000, ImageMissing), (0xB000, ImageMissing)]


@pytest.mark.parametrize(("status", "error"), STATUSES)
@pytest.mark.parametrize("how", ["get", "move"])
def test_each_retrieve_status_raises_its_exception(pacs, node, how, status, error):
    listener, inbox = node

    def refuse(event):
        if how == "move":
            contexts = [build_context(xray().SOPClassUID, EXPLICIT_LE)]
            yield "127.0.0.1", listener.port, {"contexts": contexts, "ae_title": "CXRLOOP"}
        yield 1
        yield status, None

    with pacs_client(pacs(get=refuse, move=refuse), inbox, how).session() as session, pytest.raises(error):
        session.fetch(REQUESTED)


def test_an_unknown_move_destination_is_reported_with_advice(pacs):
    def move(event):
        yield None, None

    with (
        pacs_client(pacs(move=move), how="move").session() as session,
        pytest.raises(ArchiveUnusable, match="add CXRLOOP"),
    ):
        session.fetch(REQUESTED)


def test_a_full_disk_leaves_nothing_and_is_an_os_error(pacs, tmp_path):
    inbox = Inbox(tmp_path, 1 << 60)
    with pacs_client(pacs(get=gets(xray())), inbox).session() as session, pytest.raises(OSError, match="would be free"):
        session.fetch(REQUESTED)
    assert inbox.waiting() == []


def test_an_image_without_end_is_cut_off(pacs, tmp_path, monkeypatch):
    monkeypatch.setattr("dicom.client.association.MAX_IMAGE", 1 << 20)
    inbox = Inbox(tmp_path, 0)
    with pacs_client(pacs(get=gets(xray(side=1500))), inbox).session() as session:
        with pytest.raises(ImageMissing, match="larger than"):
            session.fetch(REQUESTED)
        with pytest.raises(ArchiveBusy):
            session.fetch(REQUESTED)
    assert inbox.waiting() == []


def test_an_archive_that_aborts_during_a_transfer_is_busy_at_once(pacs, tmp_path):
    def get(event):
        event.assoc.abort()
        yield 1

    started = time.monotonic()
    with (
        pacs_client(pacs(get=get), Inbox(tmp_path, 0)).session() as session,
        pytest.raises(ArchiveBusy, match="closed the connection"),
    ):
        session.fetch(REQUESTED)
    assert time.monotonic() - started < 5


def test_a_pdu_of_four_gigabytes_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hostile():
            line, _ = server.accept()
            with line:
                line.recv(1 << 16)
                line.sendall(b"\x04\0" + b"\xff\xff\xff\xf0" + b"\0" * 4096)
                line.recv(1 << 16)

        threading.Thread(target=hostile, daemon=True).start()
        with pytest.raises(ArchiveBusy, match="closed the connection"):
            pacs_client(server.getsockname()[1]).check_connection()


def test_the_reactor_takes_no_answer_during_a_session(pacs, tmp_path):
    with pacs_client(pacs(get=gets(xray())), Inbox(tmp_path, 0)).session() as session:
        session.fetch(REQUESTED)
        queue = session.association.dimse.msg_queue
        queue.put((1, xray()))
        time.sleep(0.05)  # fifty loops of the reactor if it were not paused
        assert queue.qsize() == 1
        queue.get()


def test_over_tls_only_an_archive_with_a_trusted_certificate_is_queried(tmp_path):
    hospital, stranger = authority(tmp_path), authority(tmp_path, "stranger")
    theirs, ours = hospital.issue("pacs", hospital.pem), hospital.issue("us", hospital.pem)
    entity = AE("PACS")
    for model in ("1.2.840.10008.1.1", FIND, GET):
        entity.add_supported_context(model)
    server = entity.start_server(("127.0.0.1", 0), block=False, ssl_context=tls.server_context(theirs))
    port = server.socket.getsockname()[1]
    Pacs(Peer("PACS", "localhost", port, tls=tls.peer_context(ours)), None, "get").check_connection()  # type: ignore[arg-type]
    mistrusting = stranger.issue("us", stranger.pem)
    with pytest.raises(ArchiveBusy, match="its certificate is not trusted"):
        Pacs(Peer("PACS", "localhost", port, tls=tls.peer_context(mistrusting)), None, "get").check_connection()  # type: ignore[arg-type]
    server.shutdown()
