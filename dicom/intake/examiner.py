"""Examine files in processes of their own, with a limit on time and memory; what breaks a limit is quarantined.

Starts and replaces the processes; what is right or wrong with an image is dicom.intake.examine's to say.
"""

import multiprocessing
import os
import resource
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import TimeoutError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from pebble import CONSTS, ProcessExpired, ProcessFuture, ProcessPool

from dicom.dataset.facts import Examined
from dicom.intake.examine import Admission, examine, unexamined

UNREAD = "0" * 64  # in place of the hash of a file that could not even be read
# The kernel's memory killer, or a person: perhaps not this image's fault, so it gets a second try
GRACE_S = 30  # for starting a worker, on top of the images' own limits
FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)
# A worker killed while it fetches an image keeps its pipe locked for ever; the next one finds out after twice this
# time, and the pool is made anew. Pebble's 60 s would hold up all images for two minutes. Set in the workers too.
CONSTS.channel_lock_timeout = 3


class Examiner:
    """A pool of `workers` processes that examine images; each has `timeout_s` an image and `memory_bytes` of its own."""

    def __init__(
        self, key: bytes, rules: Admission, workers: int = 1, timeout_s: float = 60, memory_bytes: int = 3 << 30
    ):
        self._key, self._rules, self._workers = key, rules, workers
        self._timeout_s, self._memory_bytes = timeout_s, memory_bytes
        self._pool: ProcessPool | None = None

    def __enter__(self) -> "Examiner":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; an image under examination is dropped, and waits in the inbox for the next start."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def examine(self, paths: Iterable[Path]) -> Iterator[tuple[Path, Examined]]:
        """Each path with its result, in order, as soon as it is there; a file that vanished is left out.

        Reads ahead by two images a worker, no more. Raises BrokenProcessPool when workers can't be started.
        """
        running: deque[tuple[Path, ProcessFuture[Examined]]] = deque()
        paths = iter(paths)
        while True:
            while len(running) < 2 * self._workers and (path := next(paths, None)) is not None:
                running.append((path, self._schedule(path)))
            if not running:
                return
            path, future = running.popleft()
            try:
                result = self._result(path, future)
            except BrokenProcessPool:  # as in _schedule, but while we waited; a new pool, once
                self.close()
                running = deque((late, self._schedule(late)) for late, _ in running)
                result = self._result(path, self._schedule(path))
            if result is not None:
                yield path, result

    def _schedule(self, path: Path) -> "ProcessFuture[Examined]":
        if self._pool is not None and not self._pool.active:  # an idle worker was killed
            self.close()
        if self._pool is None:
            self._pool = ProcessPool(
                max_workers=self._workers,
                context=multiprocessing.get_context("spawn"),  # pyright: ignore[reportArgumentType]
                initializer=_confine,
                initargs=(self._memory_bytes,),
            )
        return self._pool.schedule(examine, args=(path, self._key, self._rules), timeout=self._timeout_s)

    def _result(self, path: Path, future: "ProcessFuture[Examined]", again: bool = True) -> Examined | None:
        try:  # this image and the one read ahead of it may each take their time; a future that outlasts both is lost
            error = future.exception(2 * self._timeout_s + GRACE_S)
        except TimeoutError:
            raise BrokenProcessPool("a worker died between taking an image and saying so") from None
        if error is None:
            return future.result()
        if isinstance(error, BrokenProcessPool):
            raise error
        if isinstance(error, FileNotFoundError):
            return None
        if isinstance(error, ProcessExpired) and error.exitcode in FROM_OUTSIDE and again:
            return self._result(path, self._schedule(path), again=False)
        try:
            return unexamined(path, self._key, self._reason(error))
        except OSError:  # not readable for us either
            return Examined("quarantined", self._reason(error), UNREAD)

    def _reason(self, error: BaseException) -> str:
        if isinstance(error, TimeoutError):
            return f"limit: examining took longer than {self._timeout_s:g} s"
        if isinstance(error, MemoryError):
            return f"limit: examining needs more than {self._memory_bytes >> 20} MiB of memory"
        if isinstance(error, ProcessExpired):
            return f"limit: the examining process died (exit code {error.exitcode})"
        return f"not examined: {type(error).__name__}"


def _confine(memory_bytes: int) -> None:
    """Run first in every worker: memory limit above what is loaded now, no core dumps, silence, die with the parent."""
    loaded = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (loaded + memory_bytes, loaded + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold a patient's image
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a decoder deep in C would not get to a handler in Python
    warnings.simplefilter("ignore")  # pydicom's warnings print element values
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
