"""The drop folder: files that people or programs copy there move into the inbox once they are complete.

Events of the file system only trigger a scan; the scan decides. Does not read the content of a file.
"""

import logging
import threading
import time
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

from dicom.store.inbox import Inbox

STILL = 1.0  # seconds without a change before a file counts as complete
SCAN_EVERY = 10.0  # seconds between scans without an event (network shares send none)
UNFINISHED = (".part", ".partial", ".tmp", ".filepart", ".crdownload", "~")  # name endings of unfinished transfers


class _WakeOnEvent(FileSystemEventHandler):
    def __init__(self, wake: threading.Event):
        self._wake = wake

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type not in ("opened", "closed_no_write", "deleted"):  # events that our own scans cause
            self._wake.set()


class DropFolder:
    """Move complete files from `folder` and its subfolders into the inbox."""

    def __init__(self, folder: Path, inbox: Inbox, log: logging.Logger | None = None):
        self._folder, self._inbox = Path(folder), inbox
        self._log = log or logging.getLogger("cxrloop.drop")
        self._seen: dict[Path, tuple[tuple[int, int], float]] = {}  # (size, mtime), and since when they are unchanged
        self._wake, self._stop = threading.Event(), threading.Event()
        self._observer = Observer()
        self._thread = threading.Thread(target=self._run, name="drop", daemon=True)

    def rescan(self) -> int:
        """Move every complete file into the inbox and return how many. A file that fails stays for the next scan."""
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
                stored = self._inbox.put_file(path)
                path.unlink()
            except OSError as error:  # too little disk, or no permission to read
                self._log.warning("a file stays in the drop folder, retrying: %s", error.strerror)
                continue
            self._log.info("moved %s from the drop folder into the inbox", stored.name)
            moved += 1
        self._seen = seen
        return moved

    def _complete(self, path: Path, seen: dict[Path, tuple[tuple[int, int], float]]) -> bool:
        """Return whether the file is unchanged for STILL seconds, by its mtime or by our clock (mtime may be ahead)."""
        try:
            facts = path.stat()
        except FileNotFoundError:
            return False
        state, now = (facts.st_size, facts.st_mtime_ns), time.monotonic()
        before, since = self._seen.get(path, (None, now))
        seen[path] = (state, since if before == state else now)
        return time.time() - facts.st_mtime >= STILL or now - seen[path][1] >= STILL

    def start(self) -> None:
        """Watch and scan the folder in a thread until `stop`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._observer.schedule(_WakeOnEvent(self._wake), str(self._folder), recursive=True)
            self._observer.start()
        except OSError as error:  # out of inotify watches, or a file system without events
            self._log.warning("no events from the drop folder, scanning it every %g s: %s", SCAN_EVERY, error.strerror)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; waits for the scan in progress."""
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
            except OSError as error:  # the share is not mounted; the next scan retries
                self._log.warning("cannot read the drop folder, retrying: %s", error.strerror)
            # scan again soon while a file is incomplete; else on an event or after SCAN_EVERY
            self._wake.wait(STILL / 2 if self._seen else SCAN_EVERY)
