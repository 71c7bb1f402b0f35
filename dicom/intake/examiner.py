"""Examine files in separate processes with limits on time and memory; a file that exceeds a limit is quarantined.

Starts and replaces the processes; dicom.intake.examine decides about the images.
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

UNREAD = "0" * 64  # in place of the hash of a file that could not be read
GRACE_S = 30  # seconds to start a worker, added to the time limits of the images
# Exit codes after a kill by the kernel (out of memory) or a person: perhaps not caused by this image, so retry once
FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)
# A worker that is killed while it reads an image from its pipe leaves the pipe locked. The next worker fails after
# twice this many seconds, and a new pool starts. Pebble's 60 s would delay all images by two minutes.
CONSTS.channel_lock_timeout = 3


class Examiner:
    """A pool of `workers` processes; each may use `timeout_s` seconds for an image and `memory_bytes` of memory."""

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
        """Stop the processes. An image in progress stays in the inbox until the next start."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def examine(self, paths: Iterable[Path]) -> Iterator[tuple[Path, Examined]]:
        """Yield each path with its result, in order and without waiting for later ones; skips a file that was removed.

        Takes at most two paths per worker in advance. Raises BrokenProcessPool when workers cannot be started.
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
            except BrokenProcessPool:  # a worker was killed meanwhile: start one new pool
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

    def _result(self, path: Path, future: "ProcessFuture[Examined]", retry: bool = True) -> Examined | None:
        try:  # this image and the one before it may each use the full time; after that the result is lost
            error = future.exception(2 * self._timeout_s + GRACE_S)
        except TimeoutError:
            raise BrokenProcessPool("a worker died after it took an image and before it reported that") from None
        if error is None:
            return future.result()
        if isinstance(error, BrokenProcessPool):
            raise error
        if isinstance(error, FileNotFoundError):
            return None
        if isinstance(error, ProcessExpired) and error.exitcode in FROM_OUTSIDE and retry:
            return self._result(path, self._schedule(path), retry=False)
        try:
            return unexamined(path, self._key, self._reason(error))
        except OSError:  # this process cannot read it either
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
    """Set up a worker: memory limit above the present use, no core dumps, no warnings, exit with the parent."""
    loaded = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (loaded + memory_bytes, loaded + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would contain a patient's image
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler in Python would not run while a decoder is in C code
    warnings.simplefilter("ignore")  # pydicom's warnings print element values
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
