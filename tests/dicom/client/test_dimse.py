"""Archives that misbehave over real associations: what is believed, asked again, or given up."""

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
from tests.support.dicom.archive_queries import ASKED, receiving
from tests.support.dicom.certificates import authority
from tests.support.dicom.pacs import free_port, xray


@pytest.fixture
def node(tmp_path):
    with receiving(tmp_path) as listening:
        yield listening


@pytest.fixture
def pacs():
    """A PACS whose answers are scripted: handlers for C-FIND, C-GET and C-MOVE."""
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


def to(port, inbox=None, how="get", aet="PACS"):
    return Pacs(Peer(aet, "127.0.0.1", port), inbox, how)  # type: ignore[arg-type]


def answers(*pairs):
    """A C-FIND handler that gives these answers, whatever is asked."""

    def find(event):
        for pair in pairs:
            made = Dataset()
            made.QueryRetrieveLevel = event.identifier.QueryRetrieveLevel
            for keyword, value in pair.items():
                setattr(made, keyword, value)
            yield 0xFF00, made

    return find


def test_a_wrong_title_a_dead_port_and_a_strange_name_each_say_what_is_wrong(pacs):
    port = pacs(require_calling_aet=["SOMEBODY"])
    with pytest.raises(ArchiveUnusable, match="does not know our AE title CXRLOOP"):
        to(port).check_connection()
    with pytest.raises(ArchiveUnusable, match="does not go by the AE title WRONG"):
        to(pacs(), aet="WRONG").check_connection()
    with pytest.raises(ArchiveBusy, match="does not answer: nothing listens there"):
        to(free_port()).check_connection()
    with pytest.raises(ArchiveUnusable, match="no address is known"):
        Pacs(Peer("PACS", "no-such-host.invalid", 104), None, "get").check_connection()  # type: ignore[arg-type]


def test_an_archive_without_c_get_is_named_with_the_way_that_may_work(pacs):
    with pytest.raises(ArchiveUnusable, match=r"does not offer C-GET.*--how move"):
        to(pacs(models=(FIND, MOVE))).check_connection()
    to(pacs(models=(FIND, MOVE)), how="move").check_connection()


def test_an_archive_that_is_full_of_associations_is_busy_not_wrong(pacs):
    port = pacs(maximum_associations=1)
    with to(port).session(), pytest.raises(ArchiveBusy, match="limit"):
        to(port).check_connection()


def test_an_archive_that_ignores_every_filter_is_not_believed(pacs):
    day = {"StudyDate": "20260105", "ModalitiesInStudy": "CR"}
    port = pacs(
        answers(
            {"StudyInstanceUID": "1.1", "PatientID": "P1"} | day,
            {"StudyInstanceUID": "1.2", "PatientID": "P2"} | day,
            {"StudyInstanceUID": "1.3", "PatientID": "P1", "StudyDate": "20250105"},
            {"StudyInstanceUID": "1.4", "PatientID": "P1"} | day | {"ModalitiesInStudy": "MR"},
        )
    )
    wanted = Query(patient="P1", since=date(2026, 1, 1), until=date(2026, 12, 31))
    assert to(port).studies(wanted) == ([archive.Study("1.1", None)], True)


def test_an_endless_list_of_studies_is_cut_off(pacs, monkeypatch):
    monkeypatch.setattr("dicom.client.dimse.MAX_MATCHES", 50)

    def endless(event):
        n = 0
        while not event.assoc.is_aborted and n < 100_000:
            made = Dataset()
            made.QueryRetrieveLevel, made.StudyInstanceUID = "STUDY", f"1.2.{n}"
            n += 1
            yield 0xFF00, made

    studies, whole = to(pacs(endless)).studies(Query(study=""))
    assert (len(studies), whole) == (50, False)


@pytest.mark.parametrize(
    ("status", "error"), [(0xA700, ArchiveBusy), (0xA900, ArchiveUnusable), (0xC001, ArchiveUnusable)]
)
def test_a_refused_question_says_whether_to_ask_again(pacs, status, error):
    def find(event):
        yield status, None

    with pytest.raises(error, match=f"{status:04X}"):
        to(pacs(find)).studies(Query())


def gets(*images, status=0x0000):
    def get(event):
        yield len(images)
        for one in images:
            yield 0xFF00, one
        yield status, None

    return get


def test_an_image_comes_by_get(pacs, tmp_path):
    inbox = Inbox(tmp_path, 0)
    with to(pacs(get=gets(xray())), inbox).session() as session:
        session.fetch(ASKED)
    assert dcmread(inbox.waiting()[0]).SOPInstanceUID == ASKED.sop_uid


def test_another_image_than_the_one_asked_for_is_refused(pacs, tmp_path):
    inbox = Inbox(tmp_path, 0)
    with to(pacs(get=gets(xray(7))), inbox).session() as session, pytest.raises(ImageMissing, match="another image"):
        session.fetch(ASKED)
    assert inbox.waiting() == []


def test_a_success_without_an_image_is_not_taken_for_one(pacs, tmp_path):
    with (
        to(pacs(get=gets()), Inbox(tmp_path, 0)).session() as session,
        pytest.raises(ImageMissing, match="does not send it"),
    ):
        session.fetch(ASKED)


STATUSES = [(0xA701, ArchiveBusy), (0xA702, ArchiveBusy), (0xC000, ImageMissing), (0xB000, ImageMissing)]


@pytest.mark.parametrize(("status", "error"), STATUSES)
@pytest.mark.parametrize("how", ["get", "move"])
def test_each_status_says_whether_to_try_again_or_to_give_up_the_image(pacs, node, how, status, error):
    listener, inbox = node

    def refuse(event):
        if how == "move":
            contexts = [build_context(xray().SOPClassUID, EXPLICIT_LE)]
            yield "127.0.0.1", listener.port, {"contexts": contexts, "ae_title": "CXRLOOP"}
        yield 1
        yield status, None

    with to(pacs(get=refuse, move=refuse), inbox, how).session() as session, pytest.raises(error):
        session.fetch(ASKED)


def test_an_archive_that_does_not_know_our_title_is_to_be_told(pacs):
    def move(event):
        yield None, None

    with to(pacs(move=move), how="move").session() as session, pytest.raises(ArchiveUnusable, match="enter CXRLOOP"):
        session.fetch(ASKED)


def test_a_full_disk_leaves_nothing_and_is_our_error_not_the_archives(pacs, tmp_path):
    inbox = Inbox(tmp_path, 1 << 60)
    with to(pacs(get=gets(xray())), inbox).session() as session, pytest.raises(OSError, match="would be free"):
        session.fetch(ASKED)
    assert inbox.waiting() == []


def test_an_image_without_end_is_cut_off(pacs, tmp_path, monkeypatch):
    monkeypatch.setattr("dicom.client.association.MAX_IMAGE", 1 << 20)
    inbox = Inbox(tmp_path, 0)
    with to(pacs(get=gets(xray(side=1500))), inbox).session() as session:
        with pytest.raises(ImageMissing, match="larger than"):
            session.fetch(ASKED)
        with pytest.raises(ArchiveBusy):
            session.fetch(ASKED)
    assert inbox.waiting() == []


def test_an_archive_that_dies_while_it_sends_is_busy_at_once(pacs, tmp_path):
    def get(event):
        event.assoc.abort()
        yield 1

    started = time.monotonic()
    with to(pacs(get=get), Inbox(tmp_path, 0)).session() as session, pytest.raises(ArchiveBusy, match="hung up"):
        session.fetch(ASKED)
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
        with pytest.raises(ArchiveBusy, match="hung up"):
            to(server.getsockname()[1]).check_connection()


def test_nobody_else_takes_an_answer_while_we_ask(pacs, tmp_path):
    with to(pacs(get=gets(xray())), Inbox(tmp_path, 0)).session() as session:
        session.fetch(ASKED)
        queue = session.association.dimse.msg_queue
        queue.put((1, xray()))
        time.sleep(0.05)  # fifty rounds of the library's reactor, were it not at rest
        assert queue.qsize() == 1
        queue.get()


def test_over_tls_only_an_archive_whose_certificate_we_trust_is_asked(tmp_path):
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
