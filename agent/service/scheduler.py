"""The agent's day and night: intake and scoring all the time, a round in the window.

Every job is a `step` that can be called at any moment and decides from the ledger; APScheduler and the
threads below only call them. Starting is recovery: the first tick of `reconcile` is not special.
"""

import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime

from apscheduler.schedulers.background import BackgroundScheduler

from agent.erasure import forget
from agent.errors import Problem, Refused
from agent.images import intake, retention
from agent.ledger import audit
from agent.ledger.database import Ledger, utc
from agent.release import release
from agent.results import reporting
from agent.rounds import records, training
from agent.site import locks
from agent.site.config import zone
from agent.site.site import Site
from agent.site.window import window_at
from deploy.bundle.bundle import sweep
from deploy.client import Client
from dicom.store.drop_folder import DropFolder

log = logging.getLogger("cxrloop")

IDLE_S = 0.2  # how long a loop that found nothing waits, where nobody in this process wakes it
FAILED_S = 1  # how long a loop that failed waits: a full disk is not the fuller for it
STOP_S = 5  # a step at hand may finish in this time; after that stopping is a crash like any other
TICK_S = 15  # how often the night and the reconciliation look at the ledger


def night_step(site: Site, now: datetime) -> str:
    """Take up an interrupted round, or start tonight's; says what was done."""
    span = window_at(now, site.config.learn.window, zone(site.config))
    with site.ledger() as ledger:
        try:
            with locks.hold(site, "round"):
                sweep(site.models)  # what a crash in the middle of sealing left; nobody seals without the lock
                row = records.open_round(ledger)
                if row and (span or _goes_on_by_day(row)):
                    until = span[1] if span and row["why"] == "night" else None
                    return training.carry_on(site, ledger, row, until)["state"]
                if row or not span:
                    return "waiting"
                if ledger.value("SELECT 1 FROM round WHERE why = 'night' AND planned_at >= ?", utc(span[0])):
                    return "done for tonight"
                return _tonight(site, ledger, now, span[1])
        except locks.Busy:
            return "running"


def _goes_on_by_day(row: dict) -> bool:
    """A round that a person started, and that did not rest in good order, goes on at once; so does a finished one."""
    return row["state"] in ("trained", "scored") or (row["why"] == "now" and row["state"] in ("planned", "training"))


def _tonight(site: Site, ledger: Ledger, now: datetime, until: datetime) -> str:
    if not ledger.value("SELECT 1 FROM image LIMIT 1"):
        return "waiting"  # a new site has nothing that could be skipped
    reason = _too_little(site, ledger)
    if reason:
        with ledger.transaction():
            number = (ledger.value("SELECT max(id) FROM round") or 0) + 1
            ledger.insert(
                "round", id=number, name=f"r{number:04d}", state="skipped", why="night", reason=reason,
                recipe=site.config.learn.recipe, planned_at=utc(now), ended_at=utc(now),
                last_image=ledger.value("SELECT max(last_image) FROM round") or 0,
            )  # fmt: skip
            audit.append(ledger, "cxrloop", "round skipped", reason, after=f"r{number:04d}")
        return "skipped"
    row = records.plan(site, ledger, "night", now, look=records.look_due(site, ledger, now))
    return training.carry_on(site, ledger, row, until)["state"]


def _too_little(site: Site, ledger: Ledger) -> str | None:
    """Why tonight is not worth a round, or None."""
    since = ledger.value("SELECT max(last_image) FROM round WHERE state != 'skipped'") or 0
    new = ledger.value(f"SELECT count(*) FROM image WHERE {records.USABLE} AND range = 'train' AND id > ?", since)
    if new < site.config.learn.min_new:
        return f"{new} new images in the train range, fewer than learn.min_new = {site.config.learn.min_new}"
    labelled = "SELECT 1 FROM label JOIN image ON image.id = label.image WHERE range = 'train' LIMIT 1"
    return None if ledger.value(labelled) else "no labelled image in the train range"


def tick(site: Site, now: datetime) -> str:
    """What the scheduler calls: finish what a crash left, then see to the night; says what was done, or what is wrong."""
    try:
        with site.ledger() as ledger:
            release.reconcile(site, ledger, now)
        return night_step(site, now)
    except (Problem, Refused) as error:
        return f"error: {error}"


def housekeeping(site: Site, now: datetime) -> str:
    """What the scheduler calls beside the night: finish what was to be forgotten, drop what is past its time."""
    try:
        with site.ledger() as ledger:
            retention.step(site, ledger, now)
            waits = forget.finish(site, ledger)
        return f"error: forget: {waits}" if waits else "done"
    except (Problem, OSError) as error:
        return f"error: {error}"


class Agent:
    """Intake, scoring and the night, each in a thread of its own, until `stop`."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.stopping = threading.Event()
        self.said: dict[Callable[[Site, datetime], str], str] = {}
        self.drop = DropFolder(site.root / "drop", site.inbox)
        self.scheduler = BackgroundScheduler(timezone=UTC)
        self.to_score, self.to_answer = (
            threading.Event(),
            threading.Event(),
        )  # the loop before has something for this one
        self.threads = [threading.Thread(target=work) for work in (self._intake, self._scores, self._answers)]

    def start(self) -> None:
        """Start everything; returns at once."""
        self.drop.start()
        for thread in self.threads:
            thread.start()
        for step in (tick, housekeeping):  # apart: a night lasts hours
            self.scheduler.add_job(
                self._tick, "interval", (step,), seconds=TICK_S, next_run_time=datetime.now(UTC),
                coalesce=True, max_instances=1, misfire_grace_time=None,
            )  # fmt: skip
        self.scheduler.start()

    def stop(self) -> None:
        """Finish the steps at hand and stop; a round that runs is left to the lock and the next start."""
        for event in (self.stopping, self.to_score, self.to_answer):
            event.set()
        self.scheduler.shutdown(wait=False)
        self.drop.stop()
        for thread in self.threads:
            thread.join(STOP_S)

    def _tick(self, step: Callable[[Site, datetime], str]) -> None:
        said = step(self.site, datetime.now(UTC))
        if said != self.said.get(step) and said.startswith("error"):
            log.error("%s", said)  # once, not every few seconds
        self.said[step] = said

    def _intake(self) -> None:
        with intake.examiner(self.site) as pool:
            self._loop("intake", lambda ledger: intake.step(self.site, ledger, pool), then=self.to_score)

    def _scores(self) -> None:
        with Client(self.site.infer_url) as client:
            self._loop(
                "scoring",
                lambda ledger: reporting.score_waiting(self.site, ledger, client),
                self.to_score,
                self.to_answer,
            )

    def _answers(self) -> None:
        link = reporting.PacsLink()
        self._loop(
            "answering", lambda ledger: reporting.send_due(self.site, ledger, link, datetime.now(UTC)), self.to_answer
        )

    def _loop(
        self,
        what: str,
        step: Callable[[Ledger], int],
        woken: threading.Event | None = None,
        then: threading.Event | None = None,
    ) -> None:
        """Step until `stopping`; after one that did nothing wait for `woken`, after one that did something set `then`.

        What fails, opening the ledger too (a full disk), is said once and tried again on a fresh connection.
        """
        woken = woken or threading.Event()
        said = ""
        while not self.stopping.is_set():
            try:
                with self.site.ledger() as ledger:
                    while not self.stopping.is_set():
                        woken.clear()  # before the look, so that what comes during it isn't missed
                        idle, said = not step(ledger), ""
                        if not idle:
                            if then:
                                then.set()
                        elif not self.stopping.is_set():  # `stop` may have come before the clear
                            woken.wait(IDLE_S)
            except Exception as error:  # the one broad except of this process: log, wait, go on
                if repr(error) != said:
                    log.exception("%s failed; trying again", what)
                said = repr(error)
                self.stopping.wait(FAILED_S)
