"""The three sessions that a server holds: current (answers), previous (loaded, for an instant rollback), standby.

Loading happens outside the swap lock, so a rollback never waits for a load. Must not import HTTP code.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deploy.bundle import pointer
from deploy.bundle.bundle import open_bundle
from deploy.bundle.keys import read_public
from deploy.errors import DeployError, KeyRefused, NoPointer, ProviderUnavailable
from deploy.server.session import Session

CANT_NOW = (KeyRefused, ProviderUnavailable, OSError)  # the machine is at fault, not the bundle
REFUSALS = (DeployError, OSError)  # everything that can keep a bundle out of service
log = logging.getLogger("deploy")


@dataclass(frozen=True)
class Held:
    """A session that is loaded, warmed and probed; `probe` is its largest logit difference."""

    session: Session
    probe: float

    @property
    def id(self) -> str:
        return self.session.bundle.id


@dataclass(frozen=True)
class Swap:
    """A change of the bundle in service; `seconds` from reading the pointer until the bundle could answer."""

    bundle: str
    previous: str | None
    seconds: float
    prepared: bool
    at: float  # time.time()


class Slots:
    """The sessions of one site folder; every method may be called from any thread."""

    def __init__(
        self,
        site: Path,
        provider: str = "auto",
        threads: int | None = None,
        on_swap: Callable[[Swap, Held], None] = lambda swap, held: None,
    ):
        self.site, self.provider, self.threads, self.on_swap = site, provider, threads, on_swap
        self.current: Held | None = None
        self.previous: Held | None = None
        self.standby: Held | None = None
        self.last_swap: Swap | None = None
        self.refused: str | None = None  # why the pointer's bundle is not the one in service
        self.pointer_seen: tuple | None = None
        self._swapping = threading.Lock()
        self._loading = threading.Lock()

    def prepare(self, bundle: str) -> Held:
        """Load, warm and probe a bundle and hold it; returns at once if it is loaded. Raises REFUSALS."""
        if held := self._loaded(bundle):
            return held
        with self._loading:
            held = self._loaded(bundle)
            if held is None:
                held = self._load(bundle)
                with self._swapping:
                    self.standby = held
        return held

    def reload(self) -> Swap:
        """Put the pointer's bundle in service. Raises REFUSALS; the bundle in service then stays."""
        started = time.perf_counter()
        self.pointer_seen = pointer.mark(self.site)
        try:
            bundle = self._pointed_bundle()
            prepared = True
            while (swap := self._swap_to(bundle, started, prepared)) is None:
                prepared = False
                self.prepare(bundle)
                bundle = self._pointed_bundle()  # the pointer may have moved during the load
        except REFUSALS as reason:
            self.refused = str(reason)
            raise
        self.refused = None
        return swap

    def follow(self) -> Swap | None:
        """Reload if the pointer was written since the last call, else return None."""
        return None if pointer.mark(self.site) == self.pointer_seen else self.reload()

    def _pointed_bundle(self) -> str:
        current = pointer.read(self.site)
        if current is None:
            raise NoPointer("no model: run a first round, or `cxrloop models import`")
        return current.bundle

    def _loaded(self, bundle: str) -> Held | None:
        slots = (self.current, self.previous, self.standby)
        return next((held for held in slots if held is not None and held.id == bundle), None)

    def _swap_to(self, bundle: str, started: float, prepared: bool) -> Swap | None:
        """Put `bundle` in service and return the swap; None if it is not loaded."""
        with self._swapping:
            held, old = self._loaded(bundle), self.current
            if held is None:
                return None
            if held is old and self.last_swap is not None:
                return self.last_swap
            self.current = held  # answers from here on; requests in flight finish on the old session
            self.previous = old
            if self.standby is held:
                self.standby = None
            seconds = time.perf_counter() - started
            swap = Swap(bundle, old.id if old else None, seconds, prepared, time.time())
            self.last_swap = swap
        log.warning("in service: %s (before: %s) after %.3f s", bundle, swap.previous, seconds)
        self.on_swap(swap, held)
        return swap

    def _load(self, bundle: str) -> Held:
        opened = open_bundle(self.site / "models", bundle, read_public(self.site / "keys"))
        session = Session(opened, self.provider, self.threads)
        session.warm()
        return Held(session, session.probe())
