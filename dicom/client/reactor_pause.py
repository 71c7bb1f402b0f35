"""Keeps the library's own reading thread away from an association that we opened, while we ask.

Paused by the library's own means it may already be past its checkpoint, and then takes an answer for itself.
"""

import threading
from typing import Any, cast

from pynetdicom.association import Association


class Rest:
    """In place of the library's reactor checkpoint: its thread stays here until the rest is over."""

    def __init__(self) -> None:
        self.arrived, self.over = threading.Event(), threading.Event()

    def wait(self) -> None:
        """Called by the reactor, each time round."""
        self.arrived.set()
        self.over.wait()

    def set(self) -> None:
        """Nothing: only the end of the association ends the rest."""

    clear = set


def resting(association: Association) -> Rest:
    """The rest of an established association's thread, begun; whoever asks must end it with `over.set()`."""
    rest = Rest()
    association._reactor_checkpoint = cast(Any, rest)
    while association.is_alive() and not rest.arrived.wait(0.1):
        pass
    return rest
