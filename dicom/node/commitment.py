"""Storage commitment as provider (PS3.4 J): each request is a file until the peer has accepted its report.

N-ACTION is answered once the request is durable. A thread then checks the images and reports on a new association.
Must not import the store: a callable checks the images.
"""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydicom import Dataset
from pynetdicom import evt
from pynetdicom.events import Event

from cxrloop.durable import write_atomic
from dicom.dataset import header
from dicom.dataset.facts import COMMITMENT_INSTANCE, STORAGE_COMMITMENT
from dicom.dataset.part10 import EXPLICIT_LE, HOSTILE, IMPLICIT_LE, is_uid
from dicom.errors import LookupFailed
from dicom.node.listener import Service

# N-ACTION statuses (PS3.7 C); failure reasons of a report (PS3.3 C.14.1.1)
SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110
NO_SUCH_INSTANCE = 0x0112
INVALID_ARGUMENT = 0x0115
CLASS_CONFLICT = 0x0119
NO_SUCH_ACTION = 0x0123
NOT_AUTHORISED = 0x0124
RESOURCE_LIMITATION = 0x0213
REQUEST_COMMITMENT = 1  # action type (PS3.4 J.3.2)
ALL_COMMITTED, SOME_FAILED = 1, 2  # event types (PS3.4 J.3.3)

MOST_REFERENCES = 10_000  # instances in one request: three years of one patient's images are a few hundred
# requests without an accepted report; above this, requests are refused: the peer is evidently not accepting reports
MOST_PENDING = 1_000
KEPT_S = 72 * 3600  # a report not accepted for three days is dropped: the peer has asked again, or given up
BACKOFF_S = (2, 10, 30, 60, 300, 900)  # between attempts for one request

Reference = tuple[str, str]  # SOP class UID, SOP instance UID
# SUCCESS or a failure reason for each reference, in order; raises LookupFailed
Check = Callable[[list[Reference]], list[int]]
# (peer's AE title, event information, event type): True when the peer accepted the report
Report = Callable[[str, Dataset, int], bool]


@dataclass(frozen=True)
class Request:
    """A request for storage commitment. `at` is its time in seconds since the epoch."""

    peer: str
    transaction: str
    references: tuple[Reference, ...]
    at: float

    @property
    def name(self) -> str:
        """The file name: a transaction repeated by its peer is one request, and no UID becomes a path."""
        return hashlib.sha256(f"{self.peer}\0{self.transaction}".encode()).hexdigest() + ".json"


class Pending:
    """The requests on disk, one file each in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for temp in folder.glob("*.tmp"):  # left by a crash: its N-ACTION was never answered
            temp.unlink(missing_ok=True)

    def keep(self, request: Request) -> None:
        """Write a request durably. Raises OSError."""
        write_atomic(self.folder / request.name, json.dumps(asdict(request)).encode(), 0o600)

    def drop(self, request: Request) -> None:
        """Remove a request that is reported or too old."""
        (self.folder / request.name).unlink(missing_ok=True)

    def all(self) -> list[Request]:
        """Return every request, oldest first."""
        requests = []
        for path in self.folder.glob("*.json"):
            raw = json.loads(path.read_bytes())
            references = tuple((sop_class, sop_uid) for sop_class, sop_uid in raw["references"])
            requests.append(Request(raw["peer"], raw["transaction"], references, raw["at"]))
        return sorted(requests, key=lambda request: request.at)

    def count(self) -> int:
        """Return the number of requests."""
        return sum(1 for _ in self.folder.glob("*.json"))


class Commitment:
    """Accepts requests, and reports on them in its own thread between `start()` and `stop()`."""

    def __init__(
        self, pending: Pending, peers: frozenset[str], check: Check, report: Report, log: logging.Logger | None = None
    ):
        self._pending, self._peers, self._check, self._report = pending, peers, check, report
        self._log = log or logging.getLogger("cxrloop.commitment")
        # request name -> (attempts, time of the next one); empty after a restart
        self._tries: dict[str, tuple[int, float]] = {}
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def service(self) -> Service:
        """The service for the listener."""
        syntaxes = (EXPLICIT_LE, IMPLICIT_LE)
        return Service(STORAGE_COMMITMENT, syntaxes, ((evt.EVT_N_ACTION, self._action),))

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="commitment", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; waits at most 5 seconds for a report in progress."""
        self._stopping.set()
        self._wake.set()
        if self._thread:
            self._thread.join(5)  # seconds; the next start repeats an interrupted report

    def step(self, now: float) -> float | None:
        """Report every request due at `now` (seconds since the epoch); return when the next one is due, or None."""
        requests = self._pending.all()
        self._tries = {request.name: self._tries.get(request.name, (0, now)) for request in requests}
        unreachable: set[str] = set()
        for request in requests:
            attempts, due = self._tries[request.name]
            if now - request.at > KEPT_S:
                self._log.error("%r did not accept a storage commitment report in 72 h: dropped", request.peer)
            elif due > now or request.peer in unreachable:  # one timeout per step for a peer, not one per request
                continue
            elif not self._settle(request):
                unreachable.add(request.peer)
                self._tries[request.name] = (attempts + 1, now + BACKOFF_S[min(attempts, len(BACKOFF_S) - 1)])
                continue
            self._pending.drop(request)
            del self._tries[request.name]
            if self._stopping.is_set():
                break
        return min((due for _, due in self._tries.values()), default=None)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                due = self.step(time.time())
            except Exception:  # noqa: BLE001 - an error in one report must not end the thread
                self._log.exception("storage commitment failed; retrying")
                due = time.time() + BACKOFF_S[-1]
            self._wake.wait(None if due is None else max(0.05, due - time.time()))

    def _settle(self, request: Request) -> bool:
        """Check the images and report; return True when the peer has accepted the report."""
        try:
            reasons = self._check(list(request.references))
        except LookupFailed as why:
            self._log.warning("storage commitment for %r delayed: %s", request.peer, why)
            return False
        failed = sum(reason != SUCCESS for reason in reasons)
        if not self._report(
            request.peer, event_information(request, reasons), SOME_FAILED if failed else ALL_COMMITTED
        ):
            self._log.warning("%r did not accept the storage commitment report; retrying", request.peer)
            return False
        self._log.info("committed %d of %d images to %r", len(reasons) - failed, len(reasons), request.peer)
        return True

    def _action(self, event: Event) -> tuple[int, None]:
        """Return the status of one N-ACTION."""
        peer = event.assoc.requestor.ae_title
        status, why = self._accept(event, peer)
        if status != SUCCESS:
            self._log.warning("storage commitment refused %04X to %r: %s", status, peer, why)
        else:
            self._wake.set()
        return status, None

    def _accept(self, event: Event, peer: str) -> tuple[int, str]:
        request: Any = event.request
        if request.RequestedSOPInstanceUID != COMMITMENT_INSTANCE:
            return NO_SUCH_INSTANCE, "not the well-known instance"
        if event.action_type != REQUEST_COMMITMENT:
            return NO_SUCH_ACTION, "action type is not 1"
        if peer not in self._peers:
            return NOT_AUTHORISED, "not in node.peers, so the address for the report is unknown"
        try:
            commitment_request = parse(event.action_information, peer, time.time())
        except HOSTILE as error:
            return INVALID_ARGUMENT, str(error) if type(error) is ValueError else type(error).__name__
        try:
            if self._pending.count() >= MOST_PENDING:
                return RESOURCE_LIMITATION, f"{MOST_PENDING} requests wait for their report"
            self._pending.keep(commitment_request)
        except OSError as error:
            return RESOURCE_LIMITATION, f"disk: {error.strerror}"
        return SUCCESS, ""


def parse(information: Dataset, peer: str, now: float) -> Request:
    """Return the request in an N-ACTION's action information (PS3.4 table J.3-1). Raises ValueError."""
    transaction = header.text(information, "TransactionUID")
    items = information.get("ReferencedSOPSequence") or []
    if not is_uid(transaction):
        raise ValueError("TransactionUID (0008,1195) is not a UID")
    if not 1 <= len(items) <= MOST_REFERENCES:
        raise ValueError(
            f"ReferencedSOPSequence (0008,1199) with {len(items)} items; 1 to {MOST_REFERENCES} are allowed"
        )
    references = tuple(
        (header.text(item, "ReferencedSOPClassUID"), header.text(item, "ReferencedSOPInstanceUID")) for item in items
    )
    if not all(is_uid(sop_class) and is_uid(sop_uid) for sop_class, sop_uid in references):
        raise ValueError("ReferencedSOPSequence (0008,1199) contains a value that is not a UID")
    return Request(peer, transaction, references, now)


def event_information(request: Request, reasons: list[int]) -> Dataset:
    """Return the event information of an N-EVENT-REPORT (PS3.4 table J.3-2)."""
    information, committed, failed = Dataset(), [], []
    information.TransactionUID = request.transaction
    for (sop_class, sop_uid), reason in zip(request.references, reasons, strict=True):
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, sop_uid
        if reason != SUCCESS:
            item.FailureReason = reason
        (committed if reason == SUCCESS else failed).append(item)
    if committed:
        information.ReferencedSOPSequence = committed
    if failed:
        information.FailedSOPSequence = failed
    return information
