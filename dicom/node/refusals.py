"""Refusals: counts every refusal by kind, and logs at most two lines a minute for each peer.

A peer is an address, a kind is a short fixed word, a reason is a sentence that names no patient.
"""

import json
import logging
import threading
import time
from collections import Counter
from pathlib import Path

WINDOW = 60  # seconds; the first refusal of a peer is logged at once, the later ones are summed up over this time
SAVE_EVERY = 1  # seconds between two writes of the counts, so that a flood does not cause a flood of writes
MAX_PEERS = 1024  # entries; refusals of further peers are counted, not logged


class Refusals:
    """Counts by kind (`totals`) and logs by peer; safe to use from several threads."""

    def __init__(self, log: logging.Logger):
        self._log, self._lock = log, threading.Lock()
        self._totals: Counter[str] = Counter()
        self._open: dict[str, tuple[float, Counter[str]]] = {}  # peer -> (start of its window, refusals not logged)
        self._file: Path | None = None
        self._written: tuple[float, int] = (0.0, 0)  # (when, sum of all counts)

    def save_to(self, path: Path) -> None:
        """Continue from the counts in the file at `path`, and save them there from now on."""
        with self._lock:
            self._file = path
            self._totals.update(read_counts(path))
            self._written = (0.0, self._totals.total())

    @property
    def totals(self) -> dict[str, int]:
        """Return the number of refusals by kind, since the start or since the counts are saved."""
        with self._lock:
            return dict(self._totals)

    def note(self, peer: str, kind: str, why: str, now: float | None = None) -> None:
        """Count one refusal of `peer` under `kind`; log `why` at most once a minute."""
        now = time.monotonic() if now is None else now
        self.flush(now)
        with self._lock:
            self._totals[kind] += 1
            if peer in self._open:
                self._open[peer][1][kind] += 1
                return
            if len(self._open) >= MAX_PEERS:
                return
            self._open[peer] = (now, Counter())
        self._log.warning("refused %s from %s: %s", kind, peer, why)

    def flush(self, now: float | None = None) -> None:
        """Log the sums that are a minute old. The server's loop calls this, so that the last sum is logged too."""
        now = time.monotonic() if now is None else now
        self._write(now)
        with self._lock:
            due = [(peer, counted) for peer, (since, counted) in self._open.items() if now - since >= WINDOW]
            for peer, counted in due:
                if counted:
                    self._open[peer] = (now, Counter())
                else:
                    del self._open[peer]
        for peer, counted in due:
            if counted:
                kinds = ", ".join(f"{times} x {kind}" for kind, times in counted.most_common())
                self._log.warning("refused %d more from %s: %s", counted.total(), peer, kinds)

    def _write(self, now: float) -> None:
        with self._lock:
            when, written = self._written
            total = self._totals.total()
            if self._file is None or total == written or now - when < SAVE_EVERY:
                return
            self._written = (now, total)
            temp = self._file.with_suffix(".tmp")
            try:
                temp.write_text(json.dumps(self._totals), "utf-8")
                temp.rename(self._file)
            except OSError as error:  # counting must not cost a connection
                self._log.warning("cannot save the counts of refusals: %s", error.strerror)


def read_counts(path: Path) -> dict[str, int]:
    """Return the saved counts by kind; {} if the file is absent or was damaged by a power cut."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
