"""Faulty DICOMweb servers over real HTTP: helpful messages, size limits, no partial images."""

import contextlib
import gzip
import io
import itertools
import json
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from dicom.client import archive, dicomweb
from dicom.client.archive import Query
from dicom.errors import ArchiveBusy, ArchiveUnusable, ImageMissing
from dicom.node import tls
from dicom.store.inbox import Inbox
from tests.support.dicom.archive_queries import REQUESTED
from tests.support.dicom.certificates import authority
from tests.support.dicom.pacs import xray
from tests.support.ports import free_port


@pytest.fixture
def http():
    """Return a function that starts a server; `reply` returns (status, headers, body or chunks) for a GET."""
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
                """Log nothing."""

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


def web(url, **more):
    return dicomweb.Web(url, **{"inbox": None} | more)


JSON = {"Content-Type": "application/dicom+json"}


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        (always(401), ArchiveUnusable, "set the bearer token"),
        (always(403), ArchiveUnusable, r"\(403\)"),
        (always(404), ArchiveUnusable, "root of its DICOMweb"),
        (always(500), ArchiveUnusable, r"\(500\)"),
        (always(503), ArchiveBusy, r"\(503\)"),
        (always(200, {"Content-Type": "text/html"}, b"<html>log in</html>"), ArchiveUnusable, "not DICOM JSON"),
        (always(200, JSON, b'"what"'), ArchiveUnusable, "not a list"),
        (always(302, {"Location": "https://elsewhere.invalid/"}), ArchiveUnusable, "root of its DICOMweb"),
        (always(200, JSON | {"Content-Length": "500"}, b"["), ArchiveBusy, "closed the connection"),
    ],
)
def test_each_http_error_has_a_helpful_message(http, reply, error, message):
    with pytest.raises(error, match=message):
        web(http(reply)).studies(Query(patient="SECRET"))


def test_no_message_contains_a_patient_id(http):
    for url in (http(always(404)), f"http://127.0.0.1:{free_port()}", http(always(200, JSON, b"{}}"))):
        with pytest.raises((ArchiveBusy, ArchiveUnusable)) as raised:
            web(url).studies(Query(patient="SEC" + "RET"))
        assert "SECRET" not in "".join(traceback.format_exception(raised.value))


def test_retry_after_of_the_server_is_used(http):
    with pytest.raises(ArchiveBusy) as raised:
        web(http(always(429, {"Retry-After": "7"}))).check_connection()
    assert raised.value.after == 7


def test_an_invalid_url_and_an_unencrypted_token_are_refused():
    for url in ("ftp://pacs/", "https://user:secret@pacs/", "https:///x", "http://pacs/?x=1", "http://[pacs/"):
        with pytest.raises(ArchiveUnusable, match="not the URL"):
            web(url)
    with pytest.raises(ArchiveUnusable, match="https only"):
        web("http://pacs.example/dicom-web", token="t")


def test_the_token_is_sent(http):
    seen = []

    def reply(request):
        seen.append(request.headers.get("Authorization"))
        return 200, JSON, b"[]"

    web(http(reply), token="abc").check_connection()
    assert seen == ["Bearer abc"]


def test_over_https_only_a_trusted_server_is_queried(http, tmp_path):
    hospital, stranger = authority(tmp_path), authority(tmp_path, "stranger")
    url = http(always(200, JSON, b"[]"), tls.server_context(hospital.issue("pacs"))).replace("http:", "https:")
    web(url, ca=hospital.pem, token="t").check_connection()
    for ca in (stranger.pem, None):
        with pytest.raises(ArchiveUnusable, match="--ca FILE"):
            web(url, ca=ca).check_connection()


def study_json(n):
    return {
        "0020000D": {"vr": "UI", "Value": [f"1.2.{n}"]},
        "00100020": {"vr": "LO", "Value": ["P1"]},
        "00201208": {"vr": "IS", "Value": [n]},
    }


def page(request, most, complete=25):
    query = parse_qs(urlsplit(request.path).query)
    start = int(query.get("offset", ["0"])[0])
    return 200, JSON, json.dumps([study_json(n) for n in range(start, min(start + most, complete))]).encode()


def test_every_page_is_read_from_a_server_with_small_pages(http):
    studies, complete = web(http(lambda request: page(request, 10))).studies(Query(patient="P1"))
    assert complete and [study.uid for study in studies] == [f"1.2.{n}" for n in range(25)]
    assert studies[7].instances == 7


def test_a_server_that_ignores_limit_and_offset_is_queried_twice(http):
    requests = []

    def reply(request):
        requests.append(1)
        return 200, JSON, json.dumps([study_json(n) for n in range(250)]).encode()

    studies, complete = web(http(reply)).studies(Query(patient="P1"))
    assert complete and len(studies) == 250 and len(requests) == 2


def test_a_server_whose_list_has_no_end_is_cut_off(http, monkeypatch):
    monkeypatch.setattr(dicomweb, "MAX_MATCHES", 60)
    studies, complete = web(http(lambda request: page(request, 20, 10**9))).studies(Query(patient="P1"))
    assert (len(studies), complete) == (60, False)


def test_a_page_without_end_is_cut_off(http, monkeypatch):
    monkeypatch.setattr(dicomweb, "MAX_PAGE", 1 << 20)
    with pytest.raises(ArchiveUnusable, match="more than 1 MiB"):
        web(http(always(200, JSON, itertools.repeat(b" " * 65536)))).studies(Query(patient="P1"))


def test_answers_of_any_shape_are_handled(http):
    odd = [
        None, 7, [], {}, {"0020000D": None}, {"0020000D": {"Value": None}}, {"0020000D": {"Value": [None, {}]}},
        {"0020000D": {"vr": "UI", "Value": ["1.2.3"]}, "00100020": {"Value": ["P1"]}, "00201208": {"Value": ["many"]}},
    ]  # fmt: skip
    studies, _ = web(http(always(200, JSON, json.dumps(odd).encode()))).studies(Query(patient="P1"))
    assert studies == [archive.Study("1.2.3", None)]


def complete(ds):
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


MULTI = {"Content-Type": 'multipart/related; type="application/dicom"; boundary="b-1"'}
FILE = complete(xray())
PART = b"--b-1\r\nContent-Type: application/dicom\r\n\r\n" + FILE + b"\r\n--b-1--\r\n"


@pytest.mark.parametrize(
    ("headers", "body"),
    [(MULTI, PART), (MULTI, b"preamble\r\n" + PART + b"epilogue"), ({"Content-Type": "application/dicom"}, FILE)],
)
def test_an_image_is_kept_as_it_came(http, tmp_path, headers, body):
    inbox = Inbox(tmp_path, 0)
    web(http(always(200, headers, body)), inbox=inbox).fetch(REQUESTED)
    assert inbox.waiting()[0].read_bytes() == FILE


@pytest.mark.parametrize(
    ("headers", "body", "message"),
    [
        (MULTI, b"", "malformed"),
        (MULTI, FILE, "malformed"),
        (MULTI, PART[: len(PART) // 2], "malformed"),
        (MULTI, PART.replace(b"--b-1--", b"--b-1\r\n\r\nmore\r\n--b-1--"), "more than one part"),
        (MULTI, PART.replace(b"DICM", b"MCID"), "not a DICOM file"),
        (MULTI, PART.replace(FILE, complete(xray(7))), "A900"),
        (MULTI, PART.replace(FILE, FILE[: len(FILE) // 2]), "3975 of 9216 bytes"),
        ({"Content-Type": "multipart/related"}, PART, "boundary"),
        ({"Content-Type": "text/html"}, b"<html>", "text/html"),
        ({}, b"", "not multipart"),
    ],
)
def test_a_malformed_image_raises_image_missing_and_leaves_nothing(http, tmp_path, headers, body, message):
    inbox = Inbox(tmp_path, 0)
    with pytest.raises(ImageMissing, match=message):
        web(http(always(200, headers, body)), inbox=inbox).fetch(REQUESTED)
    assert inbox.waiting() == []


@pytest.mark.parametrize(
    ("status", "error"),
    [(401, ArchiveUnusable), (404, ImageMissing), (410, ImageMissing), (500, ImageMissing), (503, ArchiveBusy)],
)
def test_each_status_of_wado_raises_its_exception(http, tmp_path, status, error):
    with pytest.raises(error):
        web(http(always(status)), inbox=Inbox(tmp_path, 0)).fetch(REQUESTED)


def test_an_image_without_end_over_http_is_cut_off(http, tmp_path, monkeypatch):
    monkeypatch.setattr(dicomweb, "MAX_IMAGE", 1 << 20)
    inbox = Inbox(tmp_path, 0)
    with pytest.raises(ImageMissing, match="more than 1 MiB"):
        web(http(always(200, MULTI, itertools.chain([PART[:100]], itertools.repeat(b"x" * 65536)))), inbox=inbox).fetch(
            REQUESTED
        )
    bomb = gzip.compress(b"\0" * (64 << 20))
    with pytest.raises(ImageMissing, match="more than 1 MiB"):
        web(http(always(200, MULTI | {"Content-Encoding": "gzip"}, bomb)), inbox=inbox).fetch(REQUESTED)
    assert inbox.waiting() == []
