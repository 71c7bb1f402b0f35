"""`cxrloop pull`: priors or a back-catalogue out of an archive into the node's own inbox, one study at a time.

Stopping at any moment loses nothing: what is here (inbox, ledger) is never fetched again, and a study that was done
is not even looked through again until the archive has more of it. Knows no protocol: `dicom.client.dimse` and `dicom.client.dicomweb` do.
"""

import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

from agent.errors import Problem
from agent.ledger import audit
from agent.ledger.database import Ledger, utc
from agent.network.holdings import Here
from agent.site.site import Site
from dicom.client.archive import Image, Query, Study
from dicom.client.dicomweb import Web
from dicom.client.dimse import Pacs
from dicom.errors import ArchiveBusy, ArchiveUnusable, ImageMissing
from dicom.pseudonyms import study_mark

BACKOFF_S = (2, 4, 8, 16, 30)  # seconds between tries while the archive refuses for now
GIVE_UP = 3  # images in a row that the archive refuses through all tries, or the first that it can't move
MOST_WAITING = (
    512  # images in the inbox before a pull waits for the intake, so that today's images are not kept waiting
)
HOLD_S = 5  # seconds that an association is held open without being used
STALL_S = 120  # seconds in which the intake takes nothing before a pull ends
ARRIVE_S = 30  # seconds for an image to arrive that an archive says it has moved; some say so before they send
SETTLE_S = 10  # seconds without an outcome before the rest is reported as waiting


@dataclass(frozen=True)
class Order:
    """What a person asked for. `limit` counts images fetched by this run; 0: no limit."""

    wanted: tuple[Query, ...]
    limit: int = 0
    per_minute: int = 0
    dry_run: bool = False


@dataclass
class Tally:
    """What has become of the order so far."""

    studies: int = 0
    found: int = 0
    already: int = 0
    pulled: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)


class _Full(Exception):
    """The run has fetched as many images as it may."""


def by_day(since: date | None, until: date | None, today: date) -> list[tuple[date | None, date | None]]:
    """A span cut into days, newest first: archives cut long answers short. Without a first day it stays whole."""
    if since is None:
        return [(since, until)]
    last = until or today
    return [(day, day) for day in (last - timedelta(days=n) for n in range((last - since).days + 1))]


class Puller:
    """One run: an archive, an order, and the tally. `wait` sleeps."""

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
        self.tally, self.here = Tally(), Here(site, ledger)
        self._progress, self._wait = progress, wait
        self._due, self._tries, self._given_up = 0.0, 0, 0

    def run(self) -> dict[str, Any]:
        """Fetch what the order asks for; the JSON of `cxrloop pull`. Raises Problem where nothing more can be had."""
        started, began = time.monotonic(), utc()
        try:
            self._room()
            self._greet()
            for wanted in self.order.wanted:
                self._question(wanted)
        except _Full:
            pass
        finally:
            self._note()
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
            **self._outcomes(began),
        }

    def _greet(self) -> None:
        try:
            self.archive.check_connection()
        except (ArchiveBusy, ArchiveUnusable) as error:
            raise Problem(str(error)) from None

    def _question(self, wanted: Query) -> None:
        studies, whole = self._patiently(lambda: self.archive.studies(wanted))
        if wanted.study and not studies:
            self.tally.reasons["no such study there, or none with these modalities"] += 1
        if not whole:
            days = f" for {wanted.days}" if wanted.days else ""
            self.tally.reasons[f"the archive cut its list of studies short at {len(studies)}{days}"] += 1
        for study in studies:
            self._study(study, wanted)
            self._progress(self.tally)

    def _study(self, study: Study, wanted: Query) -> None:
        """Look through one study and fetch what is not here; what a broken line interrupts is begun again."""
        self.tally.studies += 1
        modalities = "\\".join(wanted.modalities)
        key = (self.source, study_mark(self.site.key("pseudonym.key"), study.uid), modalities)
        done = self.ledger.row("SELECT * FROM pulled WHERE source = ? AND study = ? AND modalities = ?", *key)
        if done and study.instances is not None and done["instances"] == study.instances:
            self.tally.found += done["images"]
            self.tally.already += done["images"]
            return
        outcome: dict[str, str] = {}  # by image; "" while it is to be fetched
        try:
            while not self._patiently(lambda: self._images(study, wanted, outcome)):
                self._pause()
        finally:
            counts = Counter(outcome.values())
            self.tally.found += len(outcome)
            self.tally.already += counts.pop("already", 0)
            left = counts.pop("", 0)
            counts.pop("pulled", 0)
            self.tally.reasons += counts
        if not left and not counts and study.instances is not None and not self.order.dry_run:
            with self.ledger.transaction():
                row = (*key, study.instances, len(outcome), utc())
                self.ledger.run("INSERT OR REPLACE INTO pulled VALUES (?, ?, ?, ?, ?, ?)", *row)

    def _images(self, study: Study, wanted: Query, outcome: dict[str, str]) -> bool:
        """False when the next image has to wait: nothing is held open at the archive meanwhile."""
        with self.archive.session() as session:
            for image in session.images(study.uid, wanted):
                if outcome.get(image.sop_uid):
                    continue
                if self.here(image.sop_uid):
                    outcome[image.sop_uid] = "already"
                    continue
                outcome[image.sop_uid] = ""
                if self.order.dry_run:
                    continue
                if not self._turn():
                    return False
                try:
                    session.fetch(image)
                    self._arrived(image)
                except ImageMissing as error:
                    outcome[image.sop_uid] = str(error)
                    self._given_up += 1
                    if self.archive.how == "move" and not self.tally.pulled and self._given_up >= GIVE_UP:
                        raise ArchiveUnusable(
                            f"{self.source}, for each of the first {GIVE_UP} images: {error}"
                        ) from None
                    continue
                except ArchiveBusy as error:
                    if self._tries >= len(BACKOFF_S):
                        outcome[image.sop_uid] = str(error)
                        self._given_up += 1
                        self._tries = 0 if self._given_up < GIVE_UP else self._tries
                    raise
                outcome[image.sop_uid] = "pulled"
                self.tally.pulled.append(image.sop_uid)
                self._tries = self._given_up = 0
                self._progress(self.tally)
        return True

    def _patiently(self, ask: Callable[[], Any]) -> Any:
        """The answer, also of an archive that refuses for now; raises Problem when it goes on refusing."""
        self._tries = 0
        while True:
            try:
                return ask()
            except ArchiveUnusable as error:
                raise Problem(f"{error}{self._so_far()}") from None
            except ArchiveBusy as error:
                if self._tries >= len(BACKOFF_S):
                    raise Problem(f"{error}, {len(BACKOFF_S) + 1} times in a row{self._so_far()}") from None
                self._wait(max(BACKOFF_S[self._tries], error.after))
                self._tries += 1

    def _turn(self) -> bool:
        """True when one more image may be fetched now; raises _Full at the order's limit, Problem without room."""
        if self.order.limit and len(self.tally.pulled) >= self.order.limit:
            raise _Full
        self._room()
        if self.here.waiting() >= MOST_WAITING or self._due - time.monotonic() > HOLD_S:
            return False
        if self.order.per_minute:
            self._wait(max(0.0, self._due - time.monotonic()))
            self._due = max(self._due, time.monotonic()) + 60 / self.order.per_minute
        return True

    def _pause(self) -> None:
        """Wait for the next image's turn, and for the intake; raises Problem when it takes nothing in."""
        still, before = 0, self.here.waiting()
        while (waiting := self.here.waiting()) >= MOST_WAITING:
            still = still + 1 if waiting >= before else 0
            before = waiting
            if still > STALL_S:
                raise Problem(f"{waiting} images wait in the inbox; `cxrloop serve` takes them in{self._so_far()}")
            self._wait(1)
        self._wait(max(0.0, self._due - time.monotonic()))

    def _room(self) -> None:
        """Raise Problem when the disk is so full that the node would refuse a PACS."""
        config = self.site.config
        least = max(config.retention.refuse_free_mb, config.node.min_free_mb)
        free = shutil.disk_usage(self.site.root).free >> 20
        if free < least:
            raise Problem(
                f"{free} MiB of disk are free, and below {least} MiB (retention.refuse_free_mb, node.min_free_mb) "
                f"nothing is fetched: free or add disk{self._so_far()}"
            )

    def _arrived(self, image: Image) -> None:
        """Wait until an image that was moved is here; raises Problem when it went elsewhere."""
        if self.archive.how != "move":
            return
        for _ in range(ARRIVE_S * 10):
            if self.here(image.sop_uid):
                return
            self._wait(0.1)
        keys = self.site.config.node
        raise Problem(
            f"{self.source} says that it has sent an image to {keys.aet}, and it did not arrive within {ARRIVE_S} s: "
            f"does its entry for {keys.aet} name this machine and port {keys.port}?{self._so_far()}"
        )

    def _outcomes(self, began: str) -> dict[str, int]:
        """What the intake has made of the images fetched, waiting for it as long as it goes on."""
        counts = dict.fromkeys(("stored", "rejected", "quarantined", "duplicate", "waiting"), 0)
        open_, idle = list(self.tally.pulled), 0.0
        while open_:
            left = []
            for uid in open_:
                row = self.ledger.row("SELECT state, stored_at FROM image WHERE sop_uid = ? ORDER BY id DESC", uid)
                if row is None:
                    left.append(uid)
                elif row["stored_at"] < began:
                    counts["duplicate"] += 1
                else:
                    counts[row["state"] if row["state"] in counts else "stored"] += 1
            idle = idle + 0.5 if len(left) == len(open_) else 0.0
            open_ = left
            if idle > SETTLE_S:
                break
            if open_:
                self._wait(0.5)
        waiting = sum(map(self.here, open_))  # the others are gone without a row: `forget --and-refuse` wants none
        return counts | {"rejected": counts["rejected"] + len(open_) - waiting, "waiting": waiting}

    def _note(self) -> None:
        tally = self.tally
        if tally.pulled:
            counts = {"pulled": len(tally.pulled), "already": tally.already, "failed": tally.reasons.total()}
            with self.ledger.transaction():
                audit.append(self.ledger, "cxrloop pull", "images pulled", f"from {self.source}", after=counts)

    def _so_far(self) -> str:
        done = len(self.tally.pulled)
        return f"; {done} images were fetched, the same command goes on from there" if done else ""
