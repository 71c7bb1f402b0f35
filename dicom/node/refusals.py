"""Refusals: every one is counted, and each peer fills at most two lines of log a minute, however often it tries.

Knows nothing of DICOM: a peer is an address, a kind is a short fixed word, a reason is a sentence without a patient.
"""

import json
import logging
import threading
import time
from collections import Counter
from pathlib import Path

WINDOW = 60  # seconds; the first refusal of a peer is logged at once, those that follow are summed up over this
KEEP_EVERY = 1  # seconds between two writes of the counts: a flood must not become a flood of writes
MOST_PEERS = 1024  # entries; refusals of peers beyond this are counted, not logged


class Refusals:
    """Counts by kind for ever (`totals`), and logs by peer; safe from many threads."""

    def __init__(self, log: logging.Logger):
        self._log, self._lock = log, threading.Lock()
        self._totals: Counter[str] = Counter()
        self._open: dict[str, tuple[float, Counter[str]]] = {}  # peer -> (since when, what was not logged)
        self._file: Path | None = None
        self._written: tuple[float, int] = (0.0, 0)  # (when, how many in all)

    def save_to(self, path: Path) -> None:
        """Go on from the counts in the file at `path`, and keep them there."""
        with self._lock:
            self._file = path
            self._totals.update(read_counts(path))
            self._written = (0.0, self._totals.total())

    @property
    def totals(self) -> dict[str, int]:
        """How often each kind was refused, since the start or since the counts are kept."""
        with self._lock:
            return dict(self._totals)

    def note(self, peer: str, kind: str, why: str, now: float | None = None) -> None:
        """One refusal of `peer`; `kind` is counted, `why` is said once a minute."""
        now = time.monotonic() if now is None else now
        self.flush(now)
        with self._lock:
            self._totals[kind] += 1
            if peer in self._open:
                self._open[peer][1][kind] += 1
                return
            if len(self._open) >= MOST_PEERS:
                return
            self._open[peer] = (now, Counter())
        self._log.warning("refused %s from %s: %s", kind, peer, why)

    def flush(self, now: float | None = None) -> None:
        """Log what has waited for a minute; called by the port's loop, so that a flood's last count is said too."""
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
            if self._file is None or total == written or now - when < KEEP_EVERY:
                return
            self._written = (now, total)
            temp = self._file.with_suffix(".tmp")
            try:
                temp.write_text(json.dumps(self._totals), "utf-8")
                temp.rename(self._file)
            except OSError as error:  # a count is worth no connection
                self._log.warning("refusals not counted on disk: %s", error.strerror)


def read_counts(path: Path) -> dict[str, int]:
    """The counts in a file that `Refusals.save_to` wrote, by kind; none where there is no file, or a power cut hit it."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
