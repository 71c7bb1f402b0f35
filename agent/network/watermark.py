"""The disk's upper mark: below so much free space the node takes no new association that stores anything.

The lower mark is `node.min_free_mb`, at which an image within a running association gets A700 (dicom.store.inbox). Knows no DICOM.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

RETURN = 1 / 16  # of the mark: so much more must be free before images come in again, or each image would turn the sign


def disk_full_reason(free: int, limit_mb: int) -> str | None:
    """Why no new association is taken with `free` bytes left, or None; a limit of 0 is none."""
    if free >= limit_mb << 20:
        return None
    return f"{free >> 20} MB free, new associations are refused under {limit_mb} MB (retention.refuse_free_mb)"


def free_bytes(folder: Path) -> int:
    """What this process may still write on the folder's file system."""
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize


class Watermark:
    """Asked at each association; says each change to the log once. `free` gives bytes (`free_bytes`)."""

    def __init__(self, free: Callable[[], int], limit_mb: int, log: logging.Logger | None = None) -> None:
        self._free, self._limit = free, limit_mb
        self._log = log or logging.getLogger("cxrloop.listen")
        self._full = False

    def __call__(self) -> str | None:
        """Why a new association must be refused, or None. As soon as there is room again it is None again."""
        free = self._free()
        limit = self._limit + round(self._limit * RETURN) if self._full else self._limit
        why = disk_full_reason(free, limit)
        if bool(why) != self._full:
            self._full = bool(why)
            if why:
                self._log.error("disk: %s", why)
            else:
                self._log.info("disk: %d MB free, associations are taken again", free >> 20)
        return why
