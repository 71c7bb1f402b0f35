"""Storage commitment, the providing side (PS3.4 J): a request is a file until its report has been taken.

N-ACTION is answered once the request is durable; a thread then looks at the images and reports on a new association.
Refuses to know how images are kept: what is held is answered by the callable it was given.
"""

import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydicom import Dataset
from pynetdicom import evt
from pynetdicom.events import Event

from dicom.client.sender import COMMITMENT_INSTANCE, STORAGE_COMMITMENT
from dicom.dataset import header
from dicom.dataset.part10 import EXPLICIT_LE, HOSTILE, IMPLICIT_LE, is_uid
from dicom.errors import LookupFailed
from dicom.node.listener import Service
from dicom.store.inbox import sync_folder

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
ALL_HELD, SOME_FAILED = 1, 2  # event types (PS3.4 J.3.3)

MOST_REFERENCES = 10_000  # instances in one request: three years of one patient's images are a few hundred
MOST_PENDING = 1_000  # requests waiting for their report; a peer that asks more without listening is refused
KEPT_S = 72 * 3600  # a report nobody takes for three days is dropped: the peer has asked again, or given up
BACKOFF_S = (2, 10, 30, 60, 300, 900)  # between attempts for one request

Reference = tuple[str, str]  # SOP class UID, SOP instance UID
Held = Callable[[list[Reference]], list[int]]  # SUCCESS or a failure reason for each, in order; raises LookupFailed
Report = Callable[[str, Dataset, int], bool]  # (peer's AE title, event information, event type): True when taken


@dataclass(frozen=True)
class Request:
    """What a peer asked us to answer for. `at` is seconds since the epoch."""

    peer: str
    transaction: str
    references: tuple[Reference, ...]
    at: float

    @property
    def name(self) -> str:
        """The file's name: the same transaction of the same peer is one request, and no UID becomes a path."""
        return hashlib.sha256(f"{self.peer}\0{self.transaction}".encode()).hexdigest() + ".json"


class Pending:
    """Requests on disk, in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for temp in folder.glob("*.tmp"):  # of a crash: its N-ACTION was never answered
            temp.unlink(missing_ok=True)

    def keep(self, request: Request) -> None:
        """Write a request durably. Raises OSError."""
        temp = self.folder / f"{uuid.uuid4().hex}.tmp"
        try:
            with os.fdopen(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump(asdict(request), file)
                file.flush()
                os.fsync(file.fileno())
            temp.rename(self.folder / request.name)
        finally:
            temp.unlink(missing_ok=True)
        sync_folder(self.folder)

    def drop(self, request: Request) -> None:
        """Forget a request: reported, or too old."""
        (self.folder / request.name).unlink(missing_ok=True)

    def all(self) -> list[Request]:
        """Every request, oldest first."""
        found = []
        for path in self.folder.glob("*.json"):
            raw = json.loads(path.read_bytes())
            references = tuple((sop_class, sop_uid) for sop_class, sop_uid in raw["references"])
            found.append(Request(raw["peer"], raw["transaction"], references, raw["at"]))
        return sorted(found, key=lambda request: request.at)

    def count(self) -> int:
        return sum(1 for _ in self.folder.glob("*.json"))


class Commitment:
    """Takes requests in, and reports on them from a thread of its own between `start()` and `stop()`."""

    def __init__(
        self, pending: Pending, peers: frozenset[str], held: Held, report: Report, log: logging.Logger | None = None
    ):
        self._pending, self._peers, self._held, self._report = pending, peers, held, report
        self._log = log or logging.getLogger("cxrloop.commitment")
        self._tries: dict[str, tuple[int, float]] = {}  # request name -> (attempts, not before); starts anew with us
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def service(self) -> Service:
        """What the listener has to answer for this."""
        syntaxes = (EXPLICIT_LE, IMPLICIT_LE)
        return Service(STORAGE_COMMITMENT, syntaxes, ((evt.EVT_N_ACTION, self._asked),))

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="commitment", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._wake.set()
        if self._thread:
            self._thread.join(5)  # seconds; a report under way is repeated at the next start

    def step(self, now: float) -> float | None:
        """Report every request that is due at `now` (seconds since the epoch); when the next one is due, or None."""
        waiting = self._pending.all()
        self._tries = {request.name: self._tries.get(request.name, (0, now)) for request in waiting}
        unreachable: set[str] = set()
        for request in waiting:
            attempts, due = self._tries[request.name]
            if now - request.at > KEPT_S:
                self._log.error("a storage commitment report for %r was not taken in 72 h: dropped", request.peer)
            elif due > now or request.peer in unreachable:  # one dead peer costs one time-out a step, not one a request
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
            except Exception:  # noqa: BLE001 - the thread's one: a fault in one report must not be the end of all
                self._log.exception("storage commitment failed; trying again")
                due = time.time() + BACKOFF_S[-1]
            self._wake.wait(None if due is None else max(0.05, due - time.time()))

    def _settle(self, request: Request) -> bool:
        """Look at the images and report; True when the peer has taken it."""
        try:
            reasons = self._held(list(request.references))
        except LookupFailed as why:
            self._log.warning("storage commitment for %r waits: %s", request.peer, why)
            return False
        failed = sum(reason != SUCCESS for reason in reasons)
        if not self._report(request.peer, event_information(request, reasons), SOME_FAILED if failed else ALL_HELD):
            self._log.warning("storage commitment report not taken by %r; trying again", request.peer)
            return False
        self._log.info("committed %d of %d images to %r", len(reasons) - failed, len(reasons), request.peer)
        return True

    def _asked(self, event: Event) -> tuple[int, None]:
        """Status of one N-ACTION."""
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
            return NOT_AUTHORISED, "not in node.peers, so there is nowhere to report to"
        try:
            asked = parse(event.action_information, peer, time.time())
        except HOSTILE as error:
            return INVALID_ARGUMENT, str(error) if type(error) is ValueError else type(error).__name__
        try:
            if self._pending.count() >= MOST_PENDING:
                return RESOURCE_LIMITATION, f"{MOST_PENDING} requests wait for their report"
            self._pending.keep(asked)
        except OSError as error:
            return RESOURCE_LIMITATION, f"disk: {error.strerror}"
        return SUCCESS, ""


def parse(information: Dataset, peer: str, now: float) -> Request:
    """The request in an N-ACTION's action information (PS3.4 table J.3-1). Raises ValueError."""
    transaction = header.text(information, "TransactionUID")
    items = information.get("ReferencedSOPSequence") or []
    if not is_uid(transaction):
        raise ValueError("TransactionUID (0008,1195) is not a UID")
    if not 1 <= len(items) <= MOST_REFERENCES:
        raise ValueError(f"ReferencedSOPSequence (0008,1199) with {len(items)} items; 1 to {MOST_REFERENCES} are taken")
    references = tuple(
        (header.text(item, "ReferencedSOPClassUID"), header.text(item, "ReferencedSOPInstanceUID")) for item in items
    )
    if not all(is_uid(sop_class) and is_uid(sop_uid) for sop_class, sop_uid in references):
        raise ValueError("ReferencedSOPSequence (0008,1199) holds something that is not a UID")
    return Request(peer, transaction, references, now)


def event_information(request: Request, reasons: list[int]) -> Dataset:
    """What an N-EVENT-REPORT carries (PS3.4 table J.3-2)."""
    information, held, failed = Dataset(), [], []
    information.TransactionUID = request.transaction
    for (sop_class, sop_uid), reason in zip(request.references, reasons, strict=True):
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, sop_uid
        if reason != SUCCESS:
            item.FailureReason = reason
        (held if reason == SUCCESS else failed).append(item)
    if held:
        information.ReferencedSOPSequence = held
    if failed:
        information.FailedSOPSequence = failed
    return information
