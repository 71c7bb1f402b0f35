"""The upper limit on the disk: with less free space the node rejects associations that propose to store anything.

The lower limit is `node.min_free_mb`: an image within a running association then gets the status A700
(`dicom.store.inbox`). Must not import `dicom`.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

HYSTERESIS = 1 / 16  # of the limit: so much more must be free before associations are accepted again, to avoid flapping


def disk_full_reason(free: int, limit_mb: int) -> str | None:
    """Return why associations are rejected with `free` bytes left, or None; a limit of 0 switches the check off."""
    if free >= limit_mb << 20:
        return None
    return (
        f"{free >> 20} MB free; new associations are rejected below {limit_mb} MB (retention.refuse_free_mb): "
        "free or add disk"
    )


def free_bytes(folder: Path) -> int:
    """Return how many bytes this process may still write to the folder's file system."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


class Watermark:
    """Decides about each new association, and logs each change once. `free` returns bytes (see `free_bytes`)."""

    def __init__(self, free: Callable[[], int], limit_mb: int, log: logging.Logger | None = None) -> None:
        self._free, self._limit = free, limit_mb
        self._log = log or logging.getLogger("cxrloop.listen")
        self._rejecting = False

    def __call__(self) -> str | None:
        """Return why a new association must be rejected, or None."""
        free = self._free()
        limit = self._limit + round(self._limit * HYSTERESIS) if self._rejecting else self._limit
        reason = disk_full_reason(free, limit)
        if bool(reason) != self._rejecting:
            self._rejecting = bool(reason)
            if reason:
                self._log.error("disk: %s", reason)
            else:
                self._log.info("disk: %d MB free; associations are accepted again", free >> 20)
        return reason
