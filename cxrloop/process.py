"""Die with the process that started us, also when it was killed with SIGKILL.

Refuses to know what we do.
"""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Send ourselves SIGTERM once process `parent` is gone; at once where it is gone already.

    The kernel's signal comes when the *thread* that started us ends, so the handler looks whether the process lives.
    `orphaned` is the same check for a loop, for where the signal can't be had.
    """
    signal.signal(signal.SIGUSR1, lambda number, frame: _stop_if_orphaned(parent))
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGUSR1, 0, 0, 0)
    _stop_if_orphaned(parent)


def orphaned(parent: int) -> bool:
    """Whether we were handed to another parent."""
    return os.getppid() != parent


def _stop_if_orphaned(parent: int) -> None:
    if orphaned(parent):
        os.kill(os.getpid(), signal.SIGTERM)
