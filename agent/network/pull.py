"""`cxrloop pull`: fetch prior studies or a back-catalogue from an archive into the inbox, one study at a time.

An interrupted pull loses nothing: images in the inbox or in the ledger are not fetched again, and a finished study is
not listed again until the archive holds more of it. Protocols: `dicom.client.dimse`, `dicom.client.dicomweb`.
"""

import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any, Literal

from agent.errors import Problem
from agent.ledger import audit
from agent.ledger.database import Ledger, utc
from agent.network.known_images import KnownImages
from agent.site.site import Site
from dicom.client.archive import Image, Query, Study
from dicom.client.dicomweb import Web
from dicom.client.dimse import Pacs
from dicom.errors import ArchiveBusy, ArchiveUnusable, ImageMissing
from dicom.pseudonyms import study_mark

BACKOFF_S = (2, 4, 8, 16, 30)  # seconds between retries while the archive is busy
MAX_REFUSED = 3  # images in a row that stay refused after all retries, or first images that can't be moved
MOST_WAITING = 512  # images in the inbox; then a pull waits for the intake, so that new images are not delayed
HOLD_S = 5  # seconds that an unused association stays open
STALL_S = 120  # seconds without progress of the intake before a pull ends
ARRIVE_S = 30  # seconds for a moved image to arrive; some archives report the move before they send
SETTLE_S = 10  # seconds without an outcome before the remaining images are reported as waiting


@dataclass(frozen=True)
class Order:
    """What to fetch. `limit` counts images fetched by this run, 0 means no limit; `per_minute` likewise."""

    wanted: tuple[Query, ...]
    limit: int = 0
    per_minute: int = 0
    dry_run: bool = False


@dataclass
class Tally:
    """Counts of one run: studies listed, images found there, images already here, UIDs fetched, failures by reason."""

    studies: int = 0
    found: int = 0
    already: int = 0
    pulled: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)


def by_day(since: date | None, until: date | None, today: date) -> list[tuple[date | None, date | None]]:
    """Return (first, last) of each day of a span, newest first; a span without a first day stays whole.

    Archives cut long answers short, so each query asks for one day.
    """
    if since is None:
        return [(since, until)]
    last = until or today
    return [(day, day) for day in (last - timedelta(days=n) for n in range((last - since).days + 1))]


class Puller:
    """One run of an order on an archive. `wait` sleeps for some seconds; `progress` is called after each image."""

    def __init__(
        self,
        site: Site,
        ledger: Ledger,
        archive: Pacs | Web,
        order: Order,
        progress: Callable[[Tally], None] = lambda tally: None,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self.site, self.ledger, self.archive, self.order = site, ledger, archive, order
        self.source = str(archive.peer if isinstance(archive, Pacs) else archive)
        self.tally, self.known = Tally(), KnownImages(site, ledger)
        self._progress, self._wait = progress, wait
        self._next_fetch_at, self._retries, self._refused = 0.0, 0, 0  # monotonic seconds; count; count in a row
        self._limit_reached = False

    def run(self) -> dict[str, Any]:
        """Fetch what the order names; return the JSON of `cxrloop pull`. Raises Problem when the run must end early."""
        started, began = time.monotonic(), utc()
        try:
            self._check_disk()
            self._check_archive()
            for query in self.order.wanted:
                self._fetch_matching(query)
                if self._limit_reached:
                    break
        finally:
            self._write_audit()
        tally = self.tally
        return {
            "from": self.source,
            "how": self.archive.how,
            "studies": tally.studies,
            "found": tally.found,
            "already": tally.already,
            "pulled": len(tally.pulled),
            "failed": tally.reasons.total(),
            "reasons": dict(tally.reasons),
            "seconds": round(time.monotonic() - started, 1),
            **self._intake_outcomes(began),
        }

    def _check_archive(self) -> None:
        try:
            self.archive.check_connection()
        except (ArchiveBusy, ArchiveUnusable) as error:
            raise Problem(str(error)) from None

    def _fetch_matching(self, query: Query) -> None:
        """Fetch all studies that match a query."""
        studies, complete = self._with_retries(lambda: self.archive.studies(query))
        if query.study and not studies:
            self.tally.reasons["no such study in the archive, or none with these modalities"] += 1
        if not complete:
            days = f" for {query.days}" if query.days else ""
            self.tally.reasons[f"the archive cut its list of studies short at {len(studies)}{days}"] += 1
        for study in studies:
            self._fetch_study(study, query)
            if self._limit_reached:
                return
            self._progress(self.tally)

    def _fetch_study(self, study: Study, query: Query) -> None:
        """Fetch the images of a study that are not here; after a broken connection list the study again."""
        self.tally.studies += 1
        modalities = "\\".join(query.modalities)
        key = (self.source, study_mark(self.site.key("pseudonym.key"), study.uid), modalities)
        pulled = self.ledger.row("SELECT * FROM pulled WHERE source = ? AND study = ? AND modalities = ?", *key)
        if pulled and study.instances is not None and pulled["instances"] == study.instances:
            self.tally.found += pulled["images"]
            self.tally.already += pulled["images"]
            return
        outcomes: dict[str, str] = {}  # by SOP Instance UID; "" for an image that is still to be fetched
        try:
            while not self._with_retries(lambda: self._fetch_images(study, query, outcomes)):
                self._wait_for_turn()
        finally:
            counts = Counter(outcomes.values())
            self.tally.found += len(outcomes)
            self.tally.already += counts.pop("already", 0)
            unfetched = counts.pop("", 0)
            counts.pop("pulled", 0)
            self.tally.reasons += counts
        if not unfetched and not counts and study.instances is not None and not self.order.dry_run:
            with self.ledger.transaction():
                row = (*key, study.instances, len(outcomes), utc())
                self.ledger.run("INSERT OR REPLACE INTO pulled VALUES (?, ?, ?, ?, ?, ?)", *row)

    def _fetch_images(self, study: Study, query: Query, outcomes: dict[str, str]) -> bool:
        """Fetch images over one association; False when the next image must wait, so that the association is closed."""
        with self.archive.session() as session:
            for image in session.images(study.uid, query):
                if outcomes.get(image.sop_uid):
                    continue
                if image.sop_uid in self.known:
                    outcomes[image.sop_uid] = "already"
                    continue
                outcomes[image.sop_uid] = ""
                if self.order.dry_run:
                    continue
                turn = self._turn()
                if turn != "now":
                    self._limit_reached = turn == "never"
                    return self._limit_reached
                try:
                    session.fetch(image)
                    self._wait_for_arrival(image)
                except ImageMissing as error:
                    outcomes[image.sop_uid] = str(error)
                    self._refused += 1
                    if self.archive.how == "move" and not self.tally.pulled and self._refused >= MAX_REFUSED:
                        raise ArchiveUnusable(
                            f"{self.source}, for each of the first {MAX_REFUSED} images: {error}"
                        ) from None
                    continue
                except ArchiveBusy as error:
                    if self._retries >= len(BACKOFF_S):  # this image is given up; after too many in a row, the archive
                        outcomes[image.sop_uid] = str(error)
                        self._refused += 1
                        self._retries = 0 if self._refused < MAX_REFUSED else self._retries
                    raise
                outcomes[image.sop_uid] = "pulled"
                self.tally.pulled.append(image.sop_uid)
                self._retries = self._refused = 0
                self._progress(self.tally)
        return True

    def _with_retries(self, ask: Callable[[], Any]) -> Any:
        """Return what `ask` returns; retry while the archive is busy, with growing waits. Raises Problem at the end."""
        self._retries = 0
        while True:
            try:
                return ask()
            except ArchiveUnusable as error:
                raise Problem(f"{error}{self._so_far()}") from None
            except ArchiveBusy as error:
                if self._retries >= len(BACKOFF_S):
                    raise Problem(f"{error}, {len(BACKOFF_S) + 1} times in a row{self._so_far()}") from None
                self._wait(max(BACKOFF_S[self._retries], error.after))
                self._retries += 1

    def _turn(self) -> Literal["now", "later", "never"]:
        """Return when the next image may be fetched ("never": the order's limit); raises Problem on a full disk."""
        if self.order.limit and len(self.tally.pulled) >= self.order.limit:
            return "never"
        self._check_disk()
        if self.known.count_inbox() >= MOST_WAITING or self._next_fetch_at - time.monotonic() > HOLD_S:
            return "later"
        if self.order.per_minute:
            self._wait(max(0.0, self._next_fetch_at - time.monotonic()))
            self._next_fetch_at = max(self._next_fetch_at, time.monotonic()) + 60 / self.order.per_minute
        return "now"

    def _wait_for_turn(self) -> None:
        """Wait until inbox and rate allow the next image; raises Problem when the intake makes no progress."""
        idle, before = 0, self.known.count_inbox()
        while (waiting := self.known.count_inbox()) >= MOST_WAITING:
            idle = idle + 1 if waiting >= before else 0
            before = waiting
            if idle > STALL_S:
                raise Problem(f"{waiting} images wait in the inbox; start `cxrloop serve`{self._so_far()}")
            self._wait(1)
        self._wait(max(0.0, self._next_fetch_at - time.monotonic()))

    def _check_disk(self) -> None:
        """Raise Problem when the disk is so full that the node would reject associations."""
        config = self.site.config
        least = max(config.retention.refuse_free_mb, config.node.min_free_mb)
        free = shutil.disk_usage(self.site.root).free >> 20
        if free < least:
            raise Problem(
                f"{free} MiB of disk are free; a pull needs {least} MiB (retention.refuse_free_mb, node.min_free_mb): "
                f"free or add disk{self._so_far()}"
            )

    def _wait_for_arrival(self, image: Image) -> None:
        """Wait until a moved image is here; raises Problem when it does not arrive."""
        if self.archive.how != "move":
            return
        for _ in range(ARRIVE_S * 10):
            if image.sop_uid in self.known:
                return
            self._wait(0.1)
        keys = self.site.config.node
        raise Problem(
            f"{self.source} reports an image as sent to {keys.aet}, but it did not arrive within {ARRIVE_S} s: check "
            f"that its entry for {keys.aet} names this machine and port {keys.port}{self._so_far()}"
        )

    def _intake_outcomes(self, began: str) -> dict[str, int]:
        """Return what became of the fetched images; wait for the intake as long as it makes progress."""
        counts = dict.fromkeys(("stored", "rejected", "quarantined", "duplicate", "waiting"), 0)
        pending, idle = list(self.tally.pulled), 0.0
        while pending:
            unknown = []
            for uid in pending:
                row = self.ledger.row("SELECT state, stored_at FROM image WHERE sop_uid = ? ORDER BY id DESC", uid)
                if row is None:
                    unknown.append(uid)
                elif row["stored_at"] < began:
                    counts["duplicate"] += 1
                else:
                    counts[row["state"] if row["state"] in counts else "stored"] += 1
            idle = idle + 0.5 if len(unknown) == len(pending) else 0.0
            pending = unknown
            if idle > SETTLE_S:
                break
            if pending:
                self._wait(0.5)
        waiting = sum(uid in self.known for uid in pending)  # the others were rejected without a row: `--and-refuse`
        return counts | {"rejected": counts["rejected"] + len(pending) - waiting, "waiting": waiting}

    def _write_audit(self) -> None:
        tally = self.tally
        if tally.pulled:
            counts = {"pulled": len(tally.pulled), "already": tally.already, "failed": tally.reasons.total()}
            with self.ledger.transaction():
                audit.append(self.ledger, "cxrloop pull", "images pulled", f"from {self.source}", after=counts)

    def _so_far(self) -> str:
        """Return the end of an error message: how many images are here, and how to resume."""
        fetched = len(self.tally.pulled)
        return f"; {fetched} images were fetched, run the same command again to resume" if fetched else ""
