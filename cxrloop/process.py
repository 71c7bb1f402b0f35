"""Stop a process when its parent ends, also when the parent was killed with SIGKILL.

Independent of the process it guards.
"""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Send this process SIGTERM when process `parent` has ended; at once if it has ended already.

    The kernel sends its signal when the parent's *thread* ends, so the handler checks that the process lives.
    Where the kernel has no such signal, poll `orphaned` in a loop.
    """
    signal.signal(signal.SIGUSR1, lambda number, frame: _stop_if_orphaned(parent))
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGUSR1, 0, 0, 0)
    _stop_if_orphaned(parent)


def orphaned(parent: int) -> bool:
    """Return whether process `parent` is no longer the parent of this process."""
    return os.getppid() != parent


def _stop_if_orphaned(parent: int) -> None:
    if orphaned(parent):
        os.kill(os.getpid(), signal.SIGTERM)
