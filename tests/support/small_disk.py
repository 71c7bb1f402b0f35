"""A real file system of a few MB: a tmpfs in a mount namespace of its own, which ends with the process that holds it.

No root is needed where the kernel lets people make user namespaces; nothing outside the namespace sees the mount.
"""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

WAYS = {  # to a namespace of mounts, and into one of another process
    ("unshare", "--user", "--map-root-user", "--mount"): ("nsenter", "--preserve-credentials", "--user", "--mount"),
    ("unshare", "--mount"): ("nsenter", "--mount"),  # root, where user namespaces are switched off
}
HOLD = 'mount -t tmpfs -o "size=$0" small "$1" && echo mounted && exec cat'


@cache
def way() -> tuple[str, ...] | None:
    """How this machine lets us mount, or None."""
    for unshare in WAYS:
        try:
            if subprocess.run([*unshare, "mount", "-t", "tmpfs", "small", "/mnt"], capture_output=True).returncode == 0:
                return unshare
        except FileNotFoundError:
            continue
    return None


class SmallDisk:
    """The mounted folder: `place` to processes started by `inside`, `seen` to everybody else."""

    def __init__(self, place: Path, holder: int) -> None:
        self.place, self._holder = place, holder
        self.seen = Path(f"/proc/{holder}/root{place}")

    def inside(self, *command: str) -> list[str]:
        """The command line of a command that has the disk at `place`."""
        unshare = way()
        assert unshare
        return [*WAYS[unshare], "--target", str(self._holder), *command]

    def fill(self) -> Path:
        """Take the last byte; the file that does."""
        ballast = self.seen / "ballast"
        with ballast.open("ab", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError as full:
                    assert full.errno == errno.ENOSPC
        return ballast

    @property
    def free(self) -> int:
        """Bytes that are free."""
        room = os.statvfs(self.seen)
        return room.f_bavail * room.f_frsize


@contextmanager
def small_disk(place: Path, size_mb: int) -> Iterator[SmallDisk]:
    """A file system of `size_mb` MB at the folder `place`, which is made; gone after the block."""
    unshare = way()
    assert unshare, "this machine lets us mount nothing: neither user namespaces nor root"
    place.mkdir()
    holder = subprocess.Popen(
        [*unshare, "sh", "-c", HOLD, f"{size_mb}m", str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout
        assert holder.stdout.readline() == "mounted\n"
        yield SmallDisk(place, holder.pid)
    finally:
        holder.communicate(timeout=30)
