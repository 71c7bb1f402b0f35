"""A watched folder: files that people or programs drop there move into the inbox once they are complete.

The file system's events only wake it; looking again is what decides. Judges no file by its content.
"""

import logging
import threading
import time
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

from dicom.store.inbox import Inbox

STILL = 1.0  # seconds without a change before a file counts as complete
LOOK = 10.0  # seconds between looks when no event wakes us (network shares send none)
UNFINISHED = (".part", ".partial", ".tmp", ".filepart", ".crdownload", "~")  # names of transfers under way


class _Waker(FileSystemEventHandler):
    def __init__(self, wake: threading.Event):
        self._wake = wake

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type not in ("opened", "closed_no_write", "deleted"):  # what our own looks cause
            self._wake.set()


class DropFolder:
    """Moves complete files from `folder`, and folders in it, into the inbox."""

    def __init__(self, folder: Path, inbox: Inbox, log: logging.Logger | None = None):
        self._folder, self._inbox = Path(folder), inbox
        self._log = log or logging.getLogger("cxrloop.drop")
        self._seen: dict[Path, tuple[tuple[int, int], float]] = {}  # size and mtime, and since when they stand
        self._wake, self._stop = threading.Event(), threading.Event()
        self._observer = Observer()
        self._thread = threading.Thread(target=self._run, name="drop", daemon=True)

    def rescan(self) -> int:
        """Take in every complete file; returns how many. What the inbox can't take stays for the next look."""
        self._folder.mkdir(parents=True, exist_ok=True)
        moved, seen = 0, {}
        for path in sorted(self._folder.rglob("*")):
            if any(part.startswith(".") for part in path.relative_to(self._folder).parts):
                continue
            if path.name.endswith(UNFINISHED) or path.is_symlink() or not path.is_file():
                continue
            if not self._complete(path, seen):
                continue
            try:
                taken = self._inbox.put_file(path)
                path.unlink()
            except OSError as error:  # disk short, or no right to read: it stays, and is looked at again
                self._log.warning("a dropped file stays: %s", error.strerror)
                continue
            self._log.info("took %s from the drop folder", taken.name)
            moved += 1
        self._seen = seen
        return moved

    def _complete(self, path: Path, seen: dict[Path, tuple[tuple[int, int], float]]) -> bool:
        """No change for STILL seconds, by the file's own clock or by ours (a share's clock may be ahead)."""
        try:
            facts = path.stat()
        except FileNotFoundError:
            return False
        state, now = (facts.st_size, facts.st_mtime_ns), time.monotonic()
        before, since = self._seen.get(path, (None, now))
        seen[path] = (state, since if before == state else now)
        return time.time() - facts.st_mtime >= STILL or now - seen[path][1] >= STILL

    def start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._observer.schedule(_Waker(self._wake), str(self._folder), recursive=True)
            self._observer.start()
        except OSError as error:  # out of inotify watches, or a file system without events
            self._log.warning("no events from the drop folder, looking every %g s: %s", LOOK, error.strerror)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._wake.set()
        self._observer.stop()
        if self._observer.ident is not None:
            self._observer.join()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            try:
                self.rescan()
            except OSError as error:  # the share is away; it is looked for again
                self._log.warning("the drop folder can't be read: %s", error.strerror)
            # a file that is not yet complete gets another look soon; else an event or the clock wakes us
            self._wake.wait(STILL / 2 if self._seen else LOOK)
