"""Query and retrieve over DICOMweb (PS3.18): QIDO-RS with dicomweb-client, WADO-RS for the images.

Images are kept byte for byte, so this module reads the multipart answer itself. Every answer has a size limit.
Messages of the libraries are not passed on, because they contain URLs with patient ids.
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
from dicom.dataset.store_status import SUCCESS, store_status
from dicom.errors import AnswerTooLong, ArchiveBusy, ArchiveUnusable, ImageMissing, Unreadable
from dicom.store.inbox import Inbox

TIMEOUT = (10, 60)  # seconds to connect, and between two reads
LONGEST = 600  # seconds for one answer, even if it arrives steadily
PAGE = 100  # matches per request; a server with a lower limit sends fewer
MAX_PAGE = 32 << 20  # bytes of one page of matches
AS_STORED = 'multipart/related; type="application/dicom"; transfer-syntax=*'
RETRYABLE = (408, 425, 429, 502, 503, 504)  # statuses after which a later request may succeed
MAX_RETRY_AFTER = 120.0  # seconds; a longer Retry-After is cut to this
NO_ANSWER = (requests.exceptions.ConnectionError, requests.exceptions.Timeout, requests.exceptions.ChunkedEncodingError)
LOOPBACK = ("localhost", "127.0.0.1", "::1")

ROOT = "the URL must be the root of its DICOMweb service, such as https://pacs/dicom-web"

T = TypeVar("T")


class Web:
    """A DICOMweb server at `url` whose images go into `inbox`; `token` is a bearer token, `ca` a PEM file to trust."""

    how = "web"

    def __init__(self, url: str, inbox: Inbox, token: str = "", ca: Path | None = None):
        try:
            parts = urlsplit(url)
        except ValueError:  # an unpaired bracket
            raise ArchiveUnusable(f"{url}: not the URL of a DICOMweb server") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise ArchiveUnusable(f"{parts.scheme}://{parts.hostname or ''}: not the URL of a DICOMweb server")
        if token and parts.scheme == "http" and parts.hostname not in LOOPBACK:
            raise ArchiveUnusable(f"{url}: a token is sent over https only")
        self.url, self.inbox = url.rstrip("/"), inbox
        for library in ("dicomweb_client", "urllib3"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
        self._http = _LimitedSession()
        self._http.trust_env = False  # ignore proxies and .netrc of the environment
        self._http.verify = str(ca) if ca else True
        if token:
            self._http.headers["Authorization"] = f"Bearer {token}"
        self._client = DICOMwebClient(self.url, self._http, timeout=TIMEOUT, permissive_uid=True)
        self._client.set_http_retry_params(retry=False)  # the caller decides about retries

    def __str__(self) -> str:
        return self.url

    def check_connection(self) -> None:
        """Send a small query. Raises ArchiveUnusable, ArchiveBusy."""
        with self._errors():
            self._client.search_for_studies(limit=1)

    def studies(self, query: Query) -> tuple[list[Study], bool]:
        """Return the matching studies, and whether the list is complete. Raises ArchiveUnusable, ArchiveBusy."""
        keys = {"StudyInstanceUID": query.study, "PatientID": query.patient, "StudyDate": query.days}
        modalities = query.modalities if not (query.study or query.patient) else ("",)
        studies: dict[str, Study] = {}
        complete = True
        for modality in modalities:
            filters = {key: text for key, text in (keys | {"ModalitiesInStudy": modality}).items() if text}
            matches, is_last = self._all(
                lambda filters=filters, **page: self._client.search_for_studies(search_filters=filters, **page),
                lambda attributes: archive.study(attributes, query),
            )
            studies |= {study.uid: study for study in matches}
            complete = complete and is_last
        return list(studies.values()), complete

    @contextmanager
    def session(self) -> Iterator["Web"]:
        """Yield the archive itself, because HTTP keeps no state."""
        yield self

    def images(self, study_uid: str, query: Query) -> list[Image]:
        """Return the images of a study that may be chest images. Raises ArchiveUnusable, ArchiveBusy."""
        images: dict[str, Image] = {}
        fields = ["BodyPartExamined"]
        series, complete = self._all(
            lambda **page: self._client.search_for_series(study_uid, fields=fields, **page),
            lambda attributes: archive.series(attributes, study_uid, query),
        )
        for uid in series:
            matches, is_last = self._all(
                lambda uid=uid, **page: self._client.search_for_instances(study_uid, uid, **page),
                lambda attributes, uid=uid: archive.image(attributes, study_uid, uid),
            )
            images |= {image.sop_uid: image for image in matches}
            complete = complete and is_last
        if not complete:
            raise ArchiveUnusable(f"{self} has more than {MAX_MATCHES} answers for one study")
        return list(images.values())

    def fetch(self, image: Image) -> None:
        """Put an image into the inbox, byte for byte. Raises ImageMissing, ArchiveBusy, ArchiveUnusable, OSError."""
        url = f"{self.url}/studies/{image.study_uid}/series/{image.series_uid}/instances/{image.sop_uid}"
        with self._errors(image=True):
            reply = self._http.get(url, headers={"Accept": AS_STORED}, stream=True, timeout=TIMEOUT)
            try:
                reply.raise_for_status()
                body = b"".join(_pieces(reply, MAX_IMAGE))
            finally:
                reply.close()
        file = single_part(body, reply.headers.get("Content-Type", ""))
        stream = io.BytesIO(file)
        try:
            syntax = open_envelope(stream).transfer_syntax
            offset = stream.tell()
            sop_class = image.sop_class or header.text(read_header(stream, syntax, pixels=False).dataset, "SOPClassUID")
            stream.seek(offset)
        except Unreadable as error:
            raise ImageMissing(f"the server's answer is not a DICOM file: {error}") from None
        status, why = store_status(stream, syntax, sop_class, image.sop_uid)
        if status != SUCCESS:
            raise ImageMissing(f"the server's image is refused ({status:04X}): {why}")
        self.inbox.put(file)

    def _all(
        self, search: Callable[..., list[dict[str, Any]]], make: Callable[[archive.Attributes], T | None]
    ) -> tuple[list[T], bool]:
        """Return the matches of all pages, up to a page without new ones: servers may ignore limit and offset."""
        seen: set[tuple[str, ...]] = set()
        matches: list[T] = []
        offset = 0
        while len(seen) < MAX_MATCHES:
            with self._errors():
                page = search(limit=PAGE, **({"offset": offset} if offset else {}))
            if not isinstance(page, list):
                raise ArchiveUnusable(f"{self} answers a query with JSON that is not a list")
            before = len(seen)
            for match in page:
                attributes = _attributes(match)
                uids = tuple(attributes(k) for k in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"))
                if uids not in seen:
                    seen.add(uids)
                    made = make(attributes)
                    matches += [made] if made is not None else []
            if len(seen) == before:
                return matches, True
            offset += len(page)
        return matches, False

    @contextmanager
    def _errors(self, image: bool = False) -> Iterator[None]:
        """Turn errors of HTTP into ArchiveUnusable, ArchiveBusy or ImageMissing."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except requests.exceptions.SSLError:
            raise ArchiveUnusable(
                f"{self}: its certificate is not trusted; name the authority with --ca FILE"
            ) from None
        except requests.exceptions.HTTPError as error:
            raise self._refusal(error, image) from None
        except NO_ANSWER:
            raise ArchiveBusy(f"{self} does not answer, or closed the connection") from None
        except (requests.exceptions.RequestException, AnswerTooLong, ValueError, TypeError, AttributeError) as error:
            if image:
                raise ImageMissing(
                    f"the server sends {error if isinstance(error, AnswerTooLong) else 'no image'}"
                ) from None
            content = str(error) if isinstance(error, AnswerTooLong) else f"text that is not DICOM JSON; {ROOT}"
            raise ArchiveUnusable(f"{self} answers with {content}") from None

    def _refusal(self, error: requests.exceptions.HTTPError, image: bool) -> Exception:
        reply = error.response if error.response is not None else requests.Response()
        code, headers = reply.status_code, reply.headers
        if code in (401, 403):
            return ArchiveUnusable(
                f"{self} denies access ({code}): set the bearer token, or grant it the right to read"
            )
        if code in (404, 406, 410) and image:
            return ImageMissing(f"the server lists it, but does not send it ({code})")
        if code in RETRYABLE:
            delay = headers.get("Retry-After", "")
            return ArchiveBusy(
                f"{self} refuses for now ({code})", min(float(delay), MAX_RETRY_AFTER) if delay.isdecimal() else 0
            )
        if image:
            return ImageMissing(f"the server does not send it ({code})")
        return ArchiveUnusable(f"{self} cannot answer a query ({code}){'; ' + ROOT if code == 404 else ''}")


class _LimitedSession(requests.Session):
    """A session that follows no redirect and limits a page of matches to MAX_PAGE."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Return None: images come only from the URL that the user entered."""

    def send(self, request: requests.PreparedRequest, **how: Any) -> requests.Response:
        """Send a request; read the body up to the limit unless the caller streams it."""
        streamed = how.pop("stream", False)
        reply = super().send(request, stream=True, **how)
        if 300 <= reply.status_code < 400:
            raise requests.exceptions.TooManyRedirects
        if not streamed:
            reply._content = b"".join(_pieces(reply, MAX_PAGE))
        return reply


def _pieces(reply: requests.Response, limit: int) -> Iterator[bytes]:
    """Yield the decompressed body. Raises AnswerTooLong beyond `limit` bytes, Timeout beyond LONGEST seconds."""
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


def single_part(body: bytes, content_type: str) -> bytes:
    """Return the only part of a multipart/related answer (RFC 2046 5.1.1), or an application/dicom body.

    Raises ImageMissing.
    """
    message = Message()
    message["content-type"] = content_type
    if message.get_content_type() == "application/dicom":
        return body
    boundary = message.get_boundary()
    if message.get_content_type() != "multipart/related" or not boundary:
        raise ImageMissing(f"the server sends {message.get_content_type()}, not multipart/related with a boundary")
    line = b"\r\n--" + boundary.encode("latin-1")
    start = 0 if body.startswith(line[2:]) else body.find(line) + 2
    head = body.find(b"\r\n\r\n", start)
    end = body.find(line, head + 2)
    if start == 1 or head < 0 or end < 0:
        raise ImageMissing("malformed multipart answer: a boundary is missing, or it is cut short")
    if body[end + len(line) : end + len(line) + 2] != b"--":
        raise ImageMissing("malformed multipart answer: more than one part")
    return body[head + 4 : end]


def _attributes(match: Any) -> archive.Attributes:
    """Return a reader for the attributes of one DICOM JSON object (PS3.18 F.2); "" for an absent or malformed one."""

    def text(keyword: str) -> str:
        element = match.get(f"{tag_for_keyword(keyword):08X}") if isinstance(match, dict) else None
        values = element.get("Value") if isinstance(element, dict) else None
        if not isinstance(values, list):
            return ""
        return "\\".join(str(value).strip(" \0") for value in values[:64] if isinstance(value, (str, int)))

    return text
