"""The three sessions a server holds: current (answers), previous (resident, so that a rollback is instant), standby.

Loading happens outside the lock that swaps, so a rollback never waits for a load. Refuses to know HTTP.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deploy.bundle import pointer
from deploy.bundle.bundle import BundleRefused, open_bundle
from deploy.bundle.keys import KeyRefused, read_public
from deploy.server.runtime import NoRuntime, ProviderRefused
from deploy.server.session import Session

CANT_NOW = (KeyRefused, ProviderRefused, NoRuntime, OSError)  # this machine's fault: says nothing against a bundle
REFUSALS = (BundleRefused, pointer.PointerRefused, *CANT_NOW)
log = logging.getLogger("deploy")


@dataclass(frozen=True)
class Held:
    """A loaded, warmed, probed session; `probe` is its largest logit difference."""

    session: Session
    probe: float

    @property
    def id(self) -> str:
        return self.session.bundle.id


@dataclass(frozen=True)
class Swap:
    """How a bundle came into service: seconds from reading the pointer until it could answer."""

    bundle: str
    previous: str | None
    seconds: float
    prepared: bool
    at: float  # time.time()


class NothingPointed(Exception):
    """There is no `current` pointer yet."""


class Slots:
    """What a server holds of one site folder; every method may be called from any thread."""

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
        """Load, warm and probe a bundle and hold it; one of REFUSALS when it may not serve. At once if it is held."""
        if held := self._resident(bundle):
            return held
        with self._loading:
            held = self._resident(bundle)
            if held is None:
                held = self._load(bundle)
                with self._swapping:
                    self.standby = held
        return held

    def reload(self) -> Swap:
        """Put the pointer's bundle in service; a refused one (REFUSALS, NothingPointed) changes nothing."""
        started = time.perf_counter()
        self.pointer_seen = pointer.mark(self.site)
        try:
            pointed = self._pointed()
            prepared = True
            while (swap := self._swap_to(pointed, started, prepared)) is None:
                prepared = False
                self.prepare(pointed)
                pointed = self._pointed()  # it may have moved while we loaded
        except (*REFUSALS, NothingPointed) as reason:
            self.refused = str(reason)
            raise
        self.refused = None
        return swap

    def follow(self) -> Swap | None:
        """One look at the pointer: reload where it was written since the last one, else None."""
        return None if pointer.mark(self.site) == self.pointer_seen else self.reload()

    def _pointed(self) -> str:
        signed = pointer.read(self.site)
        if signed is None:
            raise NothingPointed("no model: run a first round, or `cxrloop models import`")
        return signed.bundle

    def _resident(self, bundle: str) -> Held | None:
        slots = (self.current, self.previous, self.standby)
        return next((held for held in slots if held is not None and held.id == bundle), None)

    def _swap_to(self, bundle: str, started: float, prepared: bool) -> Swap | None:
        """The swap that put `bundle` in service, None where it is not resident."""
        with self._swapping:
            held, old = self._resident(bundle), self.current
            if held is None:
                return None
            if held is old and self.last_swap is not None:
                return self.last_swap
            self.current = held  # from here on it answers; requests in flight finish on the old one
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
