"""The agent's loops: intake, scoring and sending run all the time, a round in the nightly window.

Every job is a `step` that can be called at any moment and decides from the ledger; APScheduler and the threads below
only call the steps. A start needs no recovery of its own: the first step finds what a crash left unfinished.
"""

import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime

from apscheduler.schedulers.background import BackgroundScheduler

from agent.erasure import forget
from agent.errors import Problem, Refused
from agent.images import intake, pool, retention
from agent.ledger import audit
from agent.ledger.database import Ledger, utc
from agent.release import release
from agent.results import reporting
from agent.rounds import planning, records, tidying, training
from agent.rounds.evaluation_budget import evaluation_due
from agent.rounds.records import Round
from agent.site import locks
from agent.site.config import zone
from agent.site.site import Site
from agent.site.window import window_at
from deploy.bundle.bundle import sweep
from deploy.client import Client
from dicom.store.drop_folder import DropFolder

log = logging.getLogger("cxrloop")

IDLE_S = 0.2  # wait of a loop that had nothing to do, unless another loop of this process wakes it
FAILED_S = 1  # wait of a loop whose step failed, for example on a full disk
STOP_S = 5  # time to finish the current step when stopping; then the process ends, and the next start recovers
TICK_S = 15  # seconds between two ticks of the night and of the housekeeping


def night_step(site: Site, now: datetime) -> str:
    """Resume an unfinished round or start tonight's; returns the state it reached, or why nothing was done."""
    span = window_at(now, site.config.learn.window, zone(site.config))
    with site.ledger() as ledger:
        try:
            with locks.hold(site, "round"):
                sweep(site.models)  # remove what a crash left while sealing; sealing needs this lock
                unfinished = records.open_round(ledger)
                if unfinished and (span or _resumes_by_day(unfinished)):
                    until = span[1] if span and unfinished.why == "night" else None
                    return training.carry_on(site, ledger, unfinished, until).state
                if unfinished or not span:
                    return "waiting"
                if ledger.value("SELECT 1 FROM round WHERE why = 'night' AND planned_at >= ?", utc(span[0])):
                    return "done for tonight"
                return _tonight(site, ledger, now, span[1])
        except locks.Busy:
            return "running"


def _resumes_by_day(unfinished: Round) -> bool:
    """Return True for a round that resumes outside the window.

    Those are a round that a person started and that neither ended nor was paused, and one that only lacks its evaluation.
    """
    by_hand = unfinished.why == "now" and unfinished.state in ("planned", "training")
    return by_hand or unfinished.state in ("trained", "scored")


def _tonight(site: Site, ledger: Ledger, now: datetime, until: datetime) -> str:
    if not ledger.value("SELECT 1 FROM image LIMIT 1"):
        return "waiting"  # a new site: no round to skip
    reason = _too_little(site, ledger)
    if reason:
        with ledger.transaction():
            skipped = records.add(
                ledger, now, "skipped", "night", site.config.learn.recipe, reason=reason, ended_at=utc(now),
                last_image=records.last_image_learnt(ledger),
            )  # fmt: skip
            audit.append(ledger, "cxrloop", "round skipped", reason, after=skipped.name)
        return "skipped"
    planned = planning.plan(site, ledger, "night", now, evaluate=evaluation_due(site, ledger, now))
    return training.carry_on(site, ledger, planned, until).state


def _too_little(site: Site, ledger: Ledger) -> str | None:
    """Return why tonight's round is skipped, or None."""
    since = records.last_image_learnt(ledger)
    new = ledger.value(f"SELECT count(*) FROM image WHERE {pool.USABLE} AND range = 'train' AND id > ?", since)
    if new < site.config.learn.min_new:
        return f"{new} new images in the train range, fewer than learn.min_new = {site.config.learn.min_new}"
    return planning.nothing_to_learn(site, ledger)


def tick(site: Site, now: datetime) -> str:
    """Finish a deployment that a crash interrupted, then run `night_step`; returns its result, or "error: ..."."""
    try:
        with site.ledger() as ledger:
            release.reconcile(site, ledger, now)
        return night_step(site, now)
    except (Problem, Refused) as error:
        return f"error: {error}"


def housekeeping(site: Site, now: datetime) -> str:
    """Drop files past their retention, tidy rounds, add images to the pool, finish what `forget` began.

    Returns "done" or "error: ...".
    """
    try:
        with site.ledger() as ledger:
            retention.step(site, ledger, now)
            pool.step(site, ledger)
            tidying.step(site, ledger)
            pending = forget.finish(site, ledger)
        return f"error: forget: {pending}" if pending else "done"
    except (Problem, OSError) as error:
        return f"error: {error}"


class Agent:
    """Intake, scoring, sending and the nightly round, each in its own thread, until `stop`."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.stopping = threading.Event()
        self.results: dict[Callable[[Site, datetime], str], str] = {}
        self.drop = DropFolder(site.root / "drop", site.inbox)
        self.scheduler = BackgroundScheduler(timezone=UTC)
        self.to_score, self.to_send = threading.Event(), threading.Event()  # set when the loop before has work for it
        self.threads = [threading.Thread(target=work) for work in (self._intake, self._score, self._send)]

    def start(self) -> None:
        """Start all loops and return at once."""
        self.drop.start()
        for thread in self.threads:
            thread.start()
        for step in (tick, housekeeping):  # apart: a round lasts hours
            self.scheduler.add_job(
                self._tick, "interval", (step,), seconds=TICK_S, next_run_time=datetime.now(UTC),
                coalesce=True, max_instances=1, misfire_grace_time=None,
            )  # fmt: skip
        self.scheduler.start()

    def stop(self) -> None:
        """Finish the current steps and stop; a running round resumes at the next start."""
        for event in (self.stopping, self.to_score, self.to_send):
            event.set()
        self.scheduler.shutdown(wait=False)
        self.drop.stop()
        for thread in self.threads:
            thread.join(STOP_S)

    def _tick(self, step: Callable[[Site, datetime], str]) -> None:
        result = step(self.site, datetime.now(UTC))
        if result != self.results.get(step) and result.startswith("error"):
            log.error("%s", result)  # once, not at every tick
        self.results[step] = result

    def _intake(self) -> None:
        with intake.examiner(self.site) as pool:
            self._loop("intake", lambda ledger: intake.step(self.site, ledger, pool), then=self.to_score)

    def _score(self) -> None:
        with Client(self.site.infer_url) as client:
            self._loop(
                "scoring",
                lambda ledger: reporting.score_waiting(self.site, ledger, client),
                self.to_score,
                self.to_send,
            )

    def _send(self) -> None:
        link = reporting.PacsLink()
        self._loop(
            "sending results",
            lambda ledger: reporting.send_due(self.site, ledger, link, datetime.now(UTC)),
            self.to_send,
        )

    def _loop(
        self,
        name: str,
        step: Callable[[Ledger], int],
        woken: threading.Event | None = None,
        then: threading.Event | None = None,
    ) -> None:
        """Call `step` until `stopping`: set `then` after a step that did something, wait for `woken` after one that did not.

        A failure, of opening the ledger too (a full disk), is logged once and retried on a fresh connection.
        """
        woken = woken or threading.Event()
        logged = ""
        while not self.stopping.is_set():
            try:
                with self.site.ledger() as ledger:
                    while not self.stopping.is_set():
                        woken.clear()  # before the step, so that work that arrives during the step isn't missed
                        idle, logged = not step(ledger), ""
                        if not idle:
                            if then:
                                then.set()
                        elif not self.stopping.is_set():  # `stop` may have come before the clear
                            woken.wait(IDLE_S)
            except Exception as error:  # the one broad except of this process: log, wait, go on
                if repr(error) != logged:
                    log.exception("%s failed; retrying", name)
                logged = repr(error)
                self.stopping.wait(FAILED_S)
