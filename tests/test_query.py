"""Asking archives: what is asked and believed, and Orthanc over C-GET, C-MOVE and DICOMweb as the real thing."""

import contextlib
import gzip
import io
import itertools
import json
import socket
import threading
import time
import traceback
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from certificates import authority
from orthanc import Orthanc
from pacs import data_set, film, free_port
from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom import AE, build_context, evt

from dicom import archive, tls, web
from dicom.archive import Busy, Film, Missing, Unreachable, Wanted
from dicom.inbox import Inbox
from dicom.listener import Listener, Node
from dicom.part10 import EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE
from dicom.query import FIND, GET, MOVE, Pacs
from dicom.requestor import Peer
from dicom.syntaxes import JPEG_2000_LOSSLESS, JPEG_LS

STUDY = "1.2.3"


def said(**answer):
    return lambda keyword: answer.get(keyword, "")


# What is believed


def test_a_study_that_was_not_asked_for_is_not_believed():
    wanted = Wanted(patient="P1", since=date(2026, 1, 1), until=date(2026, 1, 31))
    good = {"StudyInstanceUID": STUDY, "PatientID": "P1", "StudyDate": "20260115", "ModalitiesInStudy": "CT\\CR"}
    assert archive.study(said(**good), wanted) == archive.Study(STUDY, None)
    assert archive.study(said(**good | {"NumberOfStudyRelatedInstances": "7"}), wanted) == archive.Study(STUDY, 7)
    wrong = [
        {"PatientID": "P2"}, {"PatientID": ""}, {"StudyDate": "20260201"}, {"StudyDate": ""}, {"StudyDate": "20261399"},
        {"ModalitiesInStudy": "CT"}, {"StudyInstanceUID": "../../etc"},
    ]  # fmt: skip
    assert [archive.study(said(**good | change), wanted) for change in wrong] == [None] * len(wrong)
    assert archive.study(said(**good), Wanted(study="1.2.4")) is None


def test_a_series_passes_unless_it_says_that_it_is_no_chest_film():
    good = {"SeriesInstanceUID": "1.5"}
    assert archive.series(said(**good), STUDY, Wanted()) == "1.5"
    for part in ("CHEST", "Chest PA", "THORAX", ""):
        assert archive.series(said(**good, Modality="DX", BodyPartExamined=part), STUDY, Wanted()) == "1.5"
    assert archive.series(said(**good, Modality="CT"), STUDY, Wanted()) is None
    assert archive.series(said(**good, Modality="CR", BodyPartExamined="KNEE"), STUDY, Wanted()) is None
    assert archive.series(said(**good, StudyInstanceUID="9.9"), STUDY, Wanted()) is None


def test_our_own_results_and_other_classes_are_no_films():
    assert archive.film(said(SOPInstanceUID="1.7"), STUDY, "1.5") == Film(STUDY, "1.5", "1.7", "")
    assert archive.film(said(SOPInstanceUID="1.2.826.0.1.3680043.8.498.7427.9.1"), STUDY, "1.5") is None
    assert archive.film(said(SOPInstanceUID="1.7", SOPClassUID="1.2.840.10008.5.1.4.1.1.2"), STUDY, "1.5") is None


def test_a_span_of_days_is_spelt_as_dicom_matches_it():
    day = date(2026, 1, 5)
    assert [Wanted(since=a, until=b).days for a, b in ((None, None), (day, None), (None, day), (day, day))] == [
        "", "20260105-", "-20260105", "20260105"
    ]  # fmt: skip


# Orthanc


@pytest.fixture
def node(tmp_path):
    inbox = Inbox(tmp_path / "inbox", 0)
    listener = Listener(Node(port=0), inbox)
    listener.start()
    yield listener, inbox
    listener.stop()


@pytest.fixture
def orthanc(node, tmp_path):
    with Orthanc(tmp_path / "orthanc", port=node[0].port) as server:
        yield server


def ways(orthanc, inbox):
    peer = Peer("ORTHANC", "127.0.0.1", orthanc.port)
    return {"get": Pacs(peer, inbox, "get"), "move": Pacs(peer, inbox, "move"), "web": web.Web(orthanc.web, inbox)}


def pull(asked, wanted):
    """All films of all studies that match."""
    asked.greet()
    studies, whole = asked.studies(wanted)
    assert whole
    films = []
    for study in studies:
        with asked.session() as session:
            for one in session.films(study.uid, wanted):
                session.fetch(one)
                films.append(one.sop_uid)
    return films


@pytest.mark.peer("orthanc", "orthanc-dicomweb")
@pytest.mark.parametrize("how", ["get", "move", "web"])
def test_films_come_byte_for_byte_in_the_syntax_they_are_kept_in(node, orthanc, how):
    _, inbox = node
    films = [
        film(n, bits=12, transfer_syntax=syntax)
        for n, syntax in enumerate((EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE, JPEG_LS, JPEG_2000_LOSSLESS))
    ]
    orthanc.hold(*films)
    assert len(pull(ways(orthanc, inbox)[how], Wanted(patient="P1"))) == len(films)
    came = {dcmread(path).SOPInstanceUID: path for path in inbox.waiting()}
    for one in films:
        path = came[one.SOPInstanceUID]
        assert dcmread(path).file_meta.TransferSyntaxUID == one.file_meta.TransferSyntaxUID
        assert path.read_bytes().endswith(data_set(one))


@pytest.mark.peer("orthanc", "orthanc-dicomweb")
@pytest.mark.parametrize("how", ["get", "move", "web"])
def test_only_the_chest_films_of_a_mixed_study_are_asked_for(node, orthanc, how):
    _, inbox = node
    uid = "1.2.3.4"
    mine = film(1, study_uid=uid, study_date="20260105", modality="CR")
    knee, ct = (
        film(2, study_uid=uid, study_date="20260105", body_part="KNEE"),
        film(3, study_uid=uid, study_date="20260105"),
    )
    for n, one in enumerate((mine, knee, ct)):
        one.SeriesInstanceUID = f"{uid}.{n}"
    ct.SOPClassUID = ct.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    ct.Modality = "CT"
    other = film(4, study_date="20260106")
    orthanc.hold(mine, knee, ct, other)
    day = date(2026, 1, 5)
    assert pull(ways(orthanc, inbox)[how], Wanted(since=day, until=day)) == [mine.SOPInstanceUID]
    assert len(inbox.waiting()) == 1


@pytest.mark.peer("orthanc", "orthanc-dicomweb")
@pytest.mark.parametrize("how", ["get", "move", "web"])
def test_nothing_is_found_and_that_is_no_error(node, orthanc, how):
    assert pull(ways(orthanc, node[1])[how], Wanted(study="1.2.3.4.5.6")) == []


@pytest.mark.peer("orthanc", "orthanc-dicomweb")
@pytest.mark.parametrize("how", ["get", "move", "web"])
def test_a_film_that_is_gone_between_list_and_fetch_is_missing_and_the_next_one_comes(node, orthanc, how):
    _, inbox = node
    uid = "1.2.3.4"
    films = [film(n, study_uid=uid) for n in range(2)]
    orthanc.hold(*films)
    with ways(orthanc, inbox)[how].session() as session:
        listed = session.films(uid, Wanted())
        orthanc.drop(films[0])
        gone, there = sorted(listed, key=lambda one: one.sop_uid != films[0].SOPInstanceUID)
        with pytest.raises(Missing):
            session.fetch(gone)
        session.fetch(there)
    assert [dcmread(path).SOPInstanceUID for path in inbox.waiting()] == [films[1].SOPInstanceUID]


@pytest.mark.peer("orthanc", "orthanc-dicomweb")
def test_a_destination_that_the_archive_does_not_know_is_named(node, tmp_path):
    with Orthanc(tmp_path / "orthanc", aet="OTHER") as server:
        server.hold(film(study_uid="1.2.3.4"))
        asked = Pacs(Peer("ORTHANC", "127.0.0.1", server.port), node[1], "move")
        with asked.session() as session:
            (one,) = session.films("1.2.3.4", Wanted())
            with pytest.raises((Unreachable, Missing), match="CXRLOOP"):
                session.fetch(one)


# Archives that misbehave, over real associations


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
            entity.add_supported_context(film().SOPClassUID, EXPLICIT_LE, scu_role=True, scp_role=True)
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
    with pytest.raises(Unreachable, match="does not know our AE title CXRLOOP"):
        to(port).greet()
    with pytest.raises(Unreachable, match="does not go by the AE title WRONG"):
        to(pacs(), aet="WRONG").greet()
    with pytest.raises(Busy, match="does not answer: nothing listens there"):
        to(free_port()).greet()
    with pytest.raises(Unreachable, match="no address is known"):
        Pacs(Peer("PACS", "no-such-host.invalid", 104), None, "get").greet()  # type: ignore[arg-type]


def test_an_archive_without_c_get_is_named_with_the_way_that_may_work(pacs):
    with pytest.raises(Unreachable, match=r"does not offer C-GET.*--how move"):
        to(pacs(models=(FIND, MOVE))).greet()
    to(pacs(models=(FIND, MOVE)), how="move").greet()


def test_an_archive_that_is_full_of_associations_is_busy_not_wrong(pacs):
    port = pacs(maximum_associations=1)
    with to(port).session(), pytest.raises(Busy, match="limit"):
        to(port).greet()


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
    wanted = Wanted(patient="P1", since=date(2026, 1, 1), until=date(2026, 12, 31))
    assert to(port).studies(wanted) == ([archive.Study("1.1", None)], True)


def test_an_endless_list_of_studies_is_cut_off(pacs, monkeypatch):
    monkeypatch.setattr("dicom.query.MAX_MATCHES", 50)

    def endless(event):
        n = 0
        while not event.assoc.is_aborted and n < 100_000:
            made = Dataset()
            made.QueryRetrieveLevel, made.StudyInstanceUID = "STUDY", f"1.2.{n}"
            n += 1
            yield 0xFF00, made

    studies, whole = to(pacs(endless)).studies(Wanted(study=""))
    assert (len(studies), whole) == (50, False)


@pytest.mark.parametrize(("status", "error"), [(0xA700, Busy), (0xA900, Unreachable), (0xC001, Unreachable)])
def test_a_refused_question_says_whether_to_ask_again(pacs, status, error):
    def find(event):
        yield status, None

    with pytest.raises(error, match=f"{status:04X}"):
        to(pacs(find)).studies(Wanted())


ASKED = Film("1.2.3", "1.2.3.4", str(film().SOPInstanceUID), "")


def gets(*films, status=0x0000):
    def get(event):
        yield len(films)
        for one in films:
            yield 0xFF00, one
        yield status, None

    return get


def test_a_film_comes_by_get(pacs, tmp_path):
    inbox = Inbox(tmp_path, 0)
    with to(pacs(get=gets(film())), inbox).session() as session:
        session.fetch(ASKED)
    assert dcmread(inbox.waiting()[0]).SOPInstanceUID == ASKED.sop_uid


def test_another_film_than_the_one_asked_for_is_refused(pacs, tmp_path):
    inbox = Inbox(tmp_path, 0)
    with to(pacs(get=gets(film(7))), inbox).session() as session, pytest.raises(Missing, match="another film"):
        session.fetch(ASKED)
    assert inbox.waiting() == []


def test_a_success_without_a_film_is_not_taken_for_one(pacs, tmp_path):
    with (
        to(pacs(get=gets()), Inbox(tmp_path, 0)).session() as session,
        pytest.raises(Missing, match="does not send it"),
    ):
        session.fetch(ASKED)


STATUSES = [(0xA701, Busy), (0xA702, Busy), (0xC000, Missing), (0xB000, Missing)]


@pytest.mark.parametrize(("status", "error"), STATUSES)
@pytest.mark.parametrize("how", ["get", "move"])
def test_each_status_says_whether_to_try_again_or_to_give_up_the_film(pacs, node, how, status, error):
    listener, inbox = node

    def refuse(event):
        if how == "move":
            contexts = [build_context(film().SOPClassUID, EXPLICIT_LE)]
            yield "127.0.0.1", listener.port, {"contexts": contexts, "ae_title": "CXRLOOP"}
        yield 1
        yield status, None

    with to(pacs(get=refuse, move=refuse), inbox, how).session() as session, pytest.raises(error):
        session.fetch(ASKED)


def test_an_archive_that_does_not_know_our_title_is_to_be_told(pacs):
    def move(event):
        yield None, None

    with to(pacs(move=move), how="move").session() as session, pytest.raises(Unreachable, match="enter CXRLOOP"):
        session.fetch(ASKED)


def test_a_full_disk_leaves_nothing_and_is_our_error_not_the_archives(pacs, tmp_path):
    inbox = Inbox(tmp_path, 1 << 60)
    with to(pacs(get=gets(film())), inbox).session() as session, pytest.raises(OSError, match="would be free"):
        session.fetch(ASKED)
    assert inbox.waiting() == []


def test_a_film_without_end_is_cut_off(pacs, tmp_path, monkeypatch):
    monkeypatch.setattr("dicom.requestor.MAX_FILM", 1 << 20)
    inbox = Inbox(tmp_path, 0)
    with to(pacs(get=gets(film(side=1500))), inbox).session() as session:
        with pytest.raises(Missing, match="larger than"):
            session.fetch(ASKED)
        with pytest.raises(Busy):
            session.fetch(ASKED)
    assert inbox.waiting() == []


def test_an_archive_that_dies_while_it_sends_is_busy_at_once(pacs, tmp_path):
    def get(event):
        event.assoc.abort()
        yield 1

    started = time.monotonic()
    with to(pacs(get=get), Inbox(tmp_path, 0)).session() as session, pytest.raises(Busy, match="hung up"):
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
        with pytest.raises(Busy, match="hung up"):
            to(server.getsockname()[1]).greet()


def test_nobody_else_takes_an_answer_while_we_ask(pacs, tmp_path):
    with to(pacs(get=gets(film())), Inbox(tmp_path, 0)).session() as session:
        session.fetch(ASKED)
        queue = session.association.dimse.msg_queue
        queue.put((1, film()))
        time.sleep(0.05)  # fifty rounds of the library's reactor, were it not at rest
        assert queue.qsize() == 1
        queue.get()


def test_over_tls_only_an_archive_whose_certificate_we_trust_is_asked(tmp_path):
    hospital, stranger = authority(tmp_path), authority(tmp_path, "stranger")
    theirs, ours = hospital.issue("pacs", hospital.pem), hospital.issue("us", hospital.pem)
    entity = AE("PACS")
    for model in ("1.2.840.10008.1.1", FIND, GET):
        entity.add_supported_context(model)
    server = entity.start_server(("127.0.0.1", 0), block=False, ssl_context=tls.serving(theirs))
    port = server.socket.getsockname()[1]
    Pacs(Peer("PACS", "localhost", port, tls=tls.to_peers(ours)), None, "get").greet()  # type: ignore[arg-type]
    mistrusting = stranger.issue("us", stranger.pem)
    with pytest.raises(Busy, match="its certificate is not trusted"):
        Pacs(Peer("PACS", "localhost", port, tls=tls.to_peers(mistrusting)), None, "get").greet()  # type: ignore[arg-type]
    server.shutdown()


# DICOMweb servers that misbehave, over real HTTP


@pytest.fixture
def http():
    """A server that answers each GET as a function of its path says: (status, headers, body or chunks)."""
    servers = []

    def start(reply, context=None):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                status, headers, body = reply(self)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    for chunk in [body] if isinstance(body, bytes) else body:
                        self.wfile.write(chunk)

            def log_message(self, format, *args):
                """Quiet."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/dicom-web"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def always(status, headers=None, body=b""):
    return lambda request: (status, headers or {}, body)


def asks(url, **more):
    return web.Web(url, **{"inbox": None} | more)


JSON = {"Content-Type": "application/dicom+json"}


@pytest.mark.parametrize(
    ("reply", "error", "says"),
    [
        (always(401), Unreachable, "set the bearer token"),
        (always(403), Unreachable, r"\(403\)"),
        (always(404), Unreachable, "root of its DICOMweb"),
        (always(500), Unreachable, r"\(500\)"),
        (always(503), Busy, r"\(503\)"),
        (always(200, {"Content-Type": "text/html"}, b"<html>log in</html>"), Unreachable, "no DICOM JSON"),
        (always(200, JSON, b'"what"'), Unreachable, "not a list"),
        (always(302, {"Location": "https://elsewhere.invalid/"}), Unreachable, "root of its DICOMweb"),
        (always(200, JSON | {"Content-Length": "500"}, b"["), Busy, "hung up"),
    ],
)
def test_what_a_server_says_is_told_in_words_that_help(http, reply, error, says):
    with pytest.raises(error, match=says):
        asks(http(reply)).studies(Wanted(patient="SECRET"))


def test_no_message_holds_a_patient_id(http):
    for url in (http(always(404)), f"http://127.0.0.1:{free_port()}", http(always(200, JSON, b"{}}"))):
        with pytest.raises((Busy, Unreachable)) as raised:
            asks(url).studies(Wanted(patient="SEC" + "RET"))
        assert "SECRET" not in "".join(traceback.format_exception(raised.value))


def test_a_server_says_when_to_come_back(http):
    with pytest.raises(Busy) as raised:
        asks(http(always(429, {"Retry-After": "7"}))).greet()
    assert raised.value.after == 7


def test_a_url_that_can_not_be_one_and_a_token_in_the_clear_are_refused():
    for url in ("ftp://pacs/", "https://user:secret@pacs/", "https:///x", "http://pacs/?x=1"):
        with pytest.raises(Unreachable, match="not the URL"):
            asks(url)
    with pytest.raises(Unreachable, match="https only"):
        asks("http://pacs.example/dicom-web", token="t")


def test_the_token_is_sent(http):
    seen = []

    def reply(request):
        seen.append(request.headers.get("Authorization"))
        return 200, JSON, b"[]"

    asks(http(reply), token="abc").greet()
    assert seen == ["Bearer abc"]


def test_over_https_only_a_server_of_a_trusted_authority_is_asked(http, tmp_path):
    hospital, stranger = authority(tmp_path), authority(tmp_path, "stranger")
    url = http(always(200, JSON, b"[]"), tls.serving(hospital.issue("pacs"))).replace("http:", "https:")
    asks(url, ca=hospital.pem, token="t").greet()
    for ca in (stranger.pem, None):
        with pytest.raises(Unreachable, match="--ca FILE"):
            asks(url, ca=ca).greet()


def study_json(n):
    return {
        "0020000D": {"vr": "UI", "Value": [f"1.2.{n}"]},
        "00100020": {"vr": "LO", "Value": ["P1"]},
        "00201208": {"vr": "IS", "Value": [n]},
    }


def page(request, most, whole=25):
    asked = parse_qs(urlsplit(request.path).query)
    start = int(asked.get("offset", ["0"])[0])
    return 200, JSON, json.dumps([study_json(n) for n in range(start, min(start + most, whole))]).encode()


def test_every_page_is_read_of_a_server_that_gives_fewer_than_asked(http):
    studies, whole = asks(http(lambda request: page(request, 10))).studies(Wanted(patient="P1"))
    assert whole and [study.uid for study in studies] == [f"1.2.{n}" for n in range(25)]
    assert studies[7].instances == 7


def test_a_server_that_ignores_limit_and_offset_is_asked_no_third_time(http):
    times = []

    def reply(request):
        times.append(1)
        return 200, JSON, json.dumps([study_json(n) for n in range(250)]).encode()

    studies, whole = asks(http(reply)).studies(Wanted(patient="P1"))
    assert whole and len(studies) == 250 and len(times) == 2


def test_a_server_whose_list_has_no_end_is_cut_off(http, monkeypatch):
    monkeypatch.setattr(web, "MAX_MATCHES", 60)
    studies, whole = asks(http(lambda request: page(request, 20, 10**9))).studies(Wanted(patient="P1"))
    assert (len(studies), whole) == (60, False)


def test_a_page_without_end_is_cut_off(http, monkeypatch):
    monkeypatch.setattr(web, "MAX_PAGE", 1 << 20)
    with pytest.raises(Unreachable, match="more than 1 MiB"):
        asks(http(always(200, JSON, itertools.repeat(b" " * 65536)))).studies(Wanted(patient="P1"))


def test_answers_of_any_shape_are_survived(http):
    odd = [
        None, 7, [], {}, {"0020000D": None}, {"0020000D": {"Value": None}}, {"0020000D": {"Value": [None, {}]}},
        {"0020000D": {"vr": "UI", "Value": ["1.2.3"]}, "00100020": {"Value": ["P1"]}, "00201208": {"Value": ["many"]}},
    ]  # fmt: skip
    studies, _ = asks(http(always(200, JSON, json.dumps(odd).encode()))).studies(Wanted(patient="P1"))
    assert studies == [archive.Study("1.2.3", None)]


def whole(ds):
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


MULTI = {"Content-Type": 'multipart/related; type="application/dicom"; boundary="b-1"'}
FILE = whole(film())
PART = b"--b-1\r\nContent-Type: application/dicom\r\n\r\n" + FILE + b"\r\n--b-1--\r\n"


@pytest.mark.parametrize(
    ("headers", "body"),
    [(MULTI, PART), (MULTI, b"preamble\r\n" + PART + b"epilogue"), ({"Content-Type": "application/dicom"}, FILE)],
)
def test_a_film_is_kept_as_it_came(http, tmp_path, headers, body):
    inbox = Inbox(tmp_path, 0)
    asks(http(always(200, headers, body)), inbox=inbox).fetch(ASKED)
    assert inbox.waiting()[0].read_bytes() == FILE


@pytest.mark.parametrize(
    ("headers", "body", "says"),
    [
        (MULTI, b"", "malformed"),
        (MULTI, FILE, "malformed"),
        (MULTI, PART[: len(PART) // 2], "malformed"),
        (MULTI, PART.replace(b"--b-1--", b"--b-1\r\n\r\nmore\r\n--b-1--"), "more than the one part"),
        (MULTI, PART.replace(b"DICM", b"MCID"), "no DICOM file"),
        (MULTI, PART.replace(FILE, whole(film(7))), "A900"),
        (MULTI, PART.replace(FILE, FILE[: len(FILE) // 2]), "of its 9216 bytes"),
        ({"Content-Type": "multipart/related"}, PART, "boundary"),
        ({"Content-Type": "text/html"}, b"<html>", "text/html"),
        ({}, b"", "not multipart"),
    ],
)
def test_a_malformed_film_is_missing_and_leaves_nothing(http, tmp_path, headers, body, says):
    inbox = Inbox(tmp_path, 0)
    with pytest.raises(Missing, match=says):
        asks(http(always(200, headers, body)), inbox=inbox).fetch(ASKED)
    assert inbox.waiting() == []


@pytest.mark.parametrize(
    ("status", "error"), [(401, Unreachable), (404, Missing), (410, Missing), (500, Missing), (503, Busy)]
)
def test_a_refused_film_says_whether_to_try_again_give_up_the_film_or_stop(http, tmp_path, status, error):
    with pytest.raises(error):
        asks(http(always(status)), inbox=Inbox(tmp_path, 0)).fetch(ASKED)


def test_a_film_without_end_over_http_is_cut_off(http, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "MAX_FILM", 1 << 20)
    inbox = Inbox(tmp_path, 0)
    with pytest.raises(Missing, match="more than 1 MiB"):
        asks(
            http(always(200, MULTI, itertools.chain([PART[:100]], itertools.repeat(b"x" * 65536)))), inbox=inbox
        ).fetch(ASKED)
    bomb = gzip.compress(b"\0" * (64 << 20))
    with pytest.raises(Missing, match="more than 1 MiB"):
        asks(http(always(200, MULTI | {"Content-Encoding": "gzip"}, bomb)), inbox=inbox).fetch(ASKED)
    assert inbox.waiting() == []
