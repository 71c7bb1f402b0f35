"""The locks of a site: one file under `run/` for each kind of work. The kernel frees a lock when its holder ends.

- `round`: one round trains at a time; it also protects the models folder while a bundle is sealed.
- `release`: one deployment at a time; commands and the agent must not finish the same intent.
- `filing`: the files of an image and its row change together. Held for milliseconds.
- `pull`: one `cxrloop pull` at a time; two would fetch the same images.
- `forget`: one process at a time finishes what `cxrloop forget` began.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from agent.site.site import Site

Name = Literal["round", "release", "filing", "pull", "forget"]


class Busy(Exception):
    """Another process holds the lock."""


@contextmanager
def wait_for(site: Site, name: Name) -> Iterator[None]:
    """Wait until the lock is free, and hold it."""
    with (site.root / "run" / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def hold(site: Site, name: Name) -> Iterator[None]:
    """Hold the lock; raises Busy when another process holds it."""
    with (site.root / "run" / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(name) from None
        yield


def is_held(site: Site, name: Name) -> bool:
    """Return True when a process holds the lock."""
    try:
        with hold(site, name):
            return False
    except Busy:
        return True
