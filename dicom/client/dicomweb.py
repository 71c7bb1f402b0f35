"""Asking an archive over DICOMweb (PS3.18): QIDO-RS by dicomweb-client for what there is, WADO-RS for the images.

Images are kept byte for byte as they came, so the multipart answer is read here and not parsed into a data set.
Every answer is bounded; no message of a library is passed on, since they print URLs with patient ids in them.
"""

import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from dicomweb_client import DICOMwebClient
from pydicom.datadict import tag_for_keyword

from dicom.client import archive
from dicom.client.archive import MAX_IMAGE, MAX_MATCHES, Image, Query, Study
from dicom.dataset import header
from dicom.dataset.part10 import open_envelope, read_header
from dicom.errors import AnswerTooLong, ArchiveBusy, ArchiveUnusable, ImageMissing, Unreadable
from dicom.node.reception import SUCCESS, answer
from dicom.store.inbox import Inbox

TIMEOUT = (10, 60)  # seconds to connect, and between two reads
LONGEST = 600  # seconds for one answer, however steadily it drips
PAGE = 100  # matches a request; most servers give fewer than asked when they have a limit of their own
MAX_PAGE = 32 << 20  # bytes of one page of matches
AS_STORED = 'multipart/related; type="application/dicom"; transfer-syntax=*'
AGAIN = (408, 425, 429, 502, 503, 504)  # statuses that a later request may not get
WAIT_AT_MOST = 120.0  # seconds that a server's Retry-After is heeded
AWAY = (requests.exceptions.ConnectionError, requests.exceptions.Timeout, requests.exceptions.ChunkedEncodingError)
LOOPBACK = ("localhost", "127.0.0.1", "::1")

ROOT = "the URL must be the root of its DICOMweb service, such as https://pacs/dicom-web"

T = TypeVar("T")


class Web:
    """A DICOMweb server at `url`, its images into `inbox`; `token` is a bearer token, `ca` a PEM file to trust."""

    how = "web"

    def __init__(self, url: str, inbox: Inbox, token: str = "", ca: Path | None = None):
        try:
            parts = urlsplit(url)
        except ValueError:  # a bracket without its pair
            raise ArchiveUnusable(f"{url}: not the URL of a DICOMweb server") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise ArchiveUnusable(f"{parts.scheme}://{parts.hostname or ''}: not the URL of a DICOMweb server")
        if token and parts.scheme == "http" and parts.hostname not in LOOPBACK:
            raise ArchiveUnusable(f"{url}: a token is sent over https only")
        self.url, self.inbox = url.rstrip("/"), inbox
        for library in ("dicomweb_client", "urllib3"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
        self._http = _Bounded()
        self._http.trust_env = False  # no proxy and no .netrc decide where images come from
        self._http.verify = str(ca) if ca else True
        if token:
            self._http.headers["Authorization"] = f"Bearer {token}"
        self._client = DICOMwebClient(self.url, self._http, timeout=TIMEOUT, permissive_uid=True)
        self._client.set_http_retry_params(retry=False)  # when to try again is decided in one place, not here

    def __str__(self) -> str:
        return self.url

    def check_connection(self) -> None:
        """Whether it answers a query. Raises ArchiveUnusable, ArchiveBusy."""
        with self._meaning():
            self._client.search_for_studies(limit=1)

    def studies(self, wanted: Query) -> tuple[list[Study], bool]:
        """The studies that match, and whether that is all of them. Raises ArchiveUnusable, ArchiveBusy."""
        asked = {"StudyInstanceUID": wanted.study, "PatientID": wanted.patient, "StudyDate": wanted.days}
        modalities = wanted.modalities if not (wanted.study or wanted.patient) else ("",)
        found: dict[str, Study] = {}
        whole = True
        for modality in modalities:
            filters = {key: text for key, text in (asked | {"ModalitiesInStudy": modality}).items() if text}
            one, all_of_it = self._all(
                lambda filters=filters, **page: self._client.search_for_studies(search_filters=filters, **page),
                lambda say: archive.study(say, wanted),
            )
            found |= {study.uid: study for study in one}
            whole = whole and all_of_it
        return list(found.values()), whole

    @contextmanager
    def session(self) -> Iterator["Web"]:
        """HTTP keeps no state: the session is the archive itself."""
        yield self

    def images(self, study_uid: str, wanted: Query) -> list[Image]:
        """The images of a study that may be chest images. Raises ArchiveUnusable, ArchiveBusy."""
        found: dict[str, Image] = {}
        fields = ["BodyPartExamined"]
        kept, whole = self._all(
            lambda **page: self._client.search_for_series(study_uid, fields=fields, **page),
            lambda say: archive.series(say, study_uid, wanted),
        )
        for uid in kept:
            images, all_of_it = self._all(
                lambda uid=uid, **page: self._client.search_for_instances(study_uid, uid, **page),
                lambda say, uid=uid: archive.image(say, study_uid, uid),
            )
            found |= {image.sop_uid: image for image in images}
            whole = whole and all_of_it
        if not whole:
            raise ArchiveUnusable(f"{self} has more than {MAX_MATCHES} answers for one study")
        return list(found.values())

    def fetch(self, image: Image) -> None:
        """The image is in the inbox, as it came. Raises ImageMissing, ArchiveBusy, ArchiveUnusable, OSError."""
        url = f"{self.url}/studies/{image.study_uid}/series/{image.series_uid}/instances/{image.sop_uid}"
        with self._meaning(image=True):
            reply = self._http.get(url, headers={"Accept": AS_STORED}, stream=True, timeout=TIMEOUT)
            try:
                reply.raise_for_status()
                body = b"".join(_pieces(reply, MAX_IMAGE))
            finally:
                reply.close()
        whole = the_part(body, reply.headers.get("Content-Type", ""))
        stream = io.BytesIO(whole)
        try:
            syntax = open_envelope(stream).transfer_syntax
            offset = stream.tell()
            sop_class = image.sop_class or header.text(read_header(stream, syntax, pixels=False).dataset, "SOPClassUID")
            stream.seek(offset)
        except Unreadable as error:
            raise ImageMissing(f"what the server sends is no DICOM file: {error}") from None
        status, why = answer(stream, syntax, sop_class, image.sop_uid)
        if status != SUCCESS:
            raise ImageMissing(f"what the server sends is refused ({status:04X}): {why}")
        self.inbox.put(whole)

    def _all(
        self, ask: Callable[..., list[dict[str, Any]]], make: Callable[[archive.Say], T | None]
    ) -> tuple[list[T], bool]:
        """Every page of matches, until one brings nothing new: a server may ignore limit, offset, or both."""
        seen: set[tuple[str, ...]] = set()
        found: list[T] = []
        offset = 0
        while len(seen) < MAX_MATCHES:
            with self._meaning():
                page = ask(limit=PAGE, **({"offset": offset} if offset else {}))
            if not isinstance(page, list):
                raise ArchiveUnusable(f"{self} answers a query with something that is not a list")
            before = len(seen)
            for match in page:
                say = _reader(match)
                uids = tuple(say(k) for k in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"))
                if uids not in seen:
                    seen.add(uids)
                    made = make(say)
                    found += [made] if made is not None else []
            if len(seen) == before:
                return found, True
            offset += len(page)
        return found, False

    @contextmanager
    def _meaning(self, image: bool = False) -> Iterator[None]:
        """What goes wrong on the way, as ArchiveUnusable, ArchiveBusy or ImageMissing."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except requests.exceptions.SSLError:
            raise ArchiveUnusable(f"{self}: its certificate is not trusted; name the authority by --ca FILE") from None
        except requests.exceptions.HTTPError as error:
            raise self._refusal(error, image) from None
        except AWAY:
            raise ArchiveBusy(f"{self} does not answer, or hung up") from None
        except (requests.exceptions.RequestException, AnswerTooLong, ValueError, TypeError, AttributeError) as error:
            if image:
                raise ImageMissing(
                    f"the server sends {error if isinstance(error, AnswerTooLong) else 'no image'}"
                ) from None
            what = str(error) if isinstance(error, AnswerTooLong) else f"what is no DICOM JSON; {ROOT}"
            raise ArchiveUnusable(f"{self} answers with {what}") from None

    def _refusal(self, error: requests.exceptions.HTTPError, image: bool) -> Exception:
        reply = error.response if error.response is not None else requests.Response()
        code, headers = reply.status_code, reply.headers
        if code in (401, 403):
            return ArchiveUnusable(f"{self} refuses us ({code}): set the bearer token, or give it the right to read")
        if code in (404, 406, 410) and image:
            return ImageMissing(f"the server lists it, but does not send it ({code})")
        if code in AGAIN:
            said = headers.get("Retry-After", "")
            return ArchiveBusy(
                f"{self} refuses for now ({code})", min(float(said), WAIT_AT_MOST) if said.isdecimal() else 0
            )
        if image:
            return ImageMissing(f"the server does not send it ({code})")
        return ArchiveUnusable(f"{self} can't answer a query ({code}){'; ' + ROOT if code == 404 else ''}")


class _Bounded(requests.Session):
    """A session that follows no redirect, and reads no page of matches beyond MAX_PAGE."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """None: where images come from is what the person typed."""

    def send(self, request: requests.PreparedRequest, **how: Any) -> requests.Response:
        """As requests sends it; a body that is not streamed by the caller is read within the bound."""
        streamed = how.pop("stream", False)
        reply = super().send(request, stream=True, **how)
        if 300 <= reply.status_code < 400:
            raise requests.exceptions.TooManyRedirects
        if not streamed:
            reply._content = b"".join(_pieces(reply, MAX_PAGE))
        return reply


def _pieces(reply: requests.Response, limit: int) -> Iterator[bytes]:
    """The body in pieces, decompressed. Raises AnswerTooLong beyond `limit` bytes, Timeout beyond LONGEST seconds."""
    size, until = 0, time.monotonic() + LONGEST
    for piece in reply.iter_content(1 << 16):
        size += len(piece)
        if size > limit:
            reply.close()
            raise AnswerTooLong(f"more than {limit >> 20} MiB")
        if time.monotonic() > until:
            reply.close()
            raise requests.exceptions.Timeout
        yield piece


def the_part(body: bytes, content_type: str) -> bytes:
    """The one part of a multipart/related answer (RFC 2046 5.1.1), or a bare application/dicom body. Raises ImageMissing."""
    said = Message()
    said["content-type"] = content_type
    if said.get_content_type() == "application/dicom":
        return body
    boundary = said.get_boundary()
    if said.get_content_type() != "multipart/related" or not boundary:
        raise ImageMissing(f"the server sends {said.get_content_type()}, not multipart/related with a boundary")
    line = b"\r\n--" + boundary.encode("latin-1")
    start = 0 if body.startswith(line[2:]) else body.find(line) + 2
    head = body.find(b"\r\n\r\n", start)
    end = body.find(line, head + 2)
    if start == 1 or head < 0 or end < 0:
        raise ImageMissing("malformed multipart answer: a boundary is missing, or it is cut short")
    if body[end + len(line) : end + len(line) + 2] != b"--":
        raise ImageMissing("malformed multipart answer: more than the one part asked for")
    return body[head + 4 : end]


def _reader(match: Any) -> archive.Say:
    """The text of an attribute of one DICOM JSON object (PS3.18 F.2); "" for whatever is not as it should be."""

    def say(keyword: str) -> str:
        element = match.get(f"{tag_for_keyword(keyword):08X}") if isinstance(match, dict) else None
        values = element.get("Value") if isinstance(element, dict) else None
        if not isinstance(values, list):
            return ""
        return "\\".join(str(value).strip(" \0") for value in values[:64] if isinstance(value, (str, int)))

    return say
