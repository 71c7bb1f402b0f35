"""The lock under which an image's files and its row change together: one at a time, whichever process does it.

Held for milliseconds by the intake (keep the files, write the row), by retention and by `forget` (unlink what a row named).
The system frees it when the holder dies. Refuses to know what is filed.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager

from agent.site.site import Site


@contextmanager
def filing(site: Site) -> Iterator[None]:
    """Wait for the lock and hold it."""
    with (site.root / "run" / "filing.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
