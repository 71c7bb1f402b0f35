"""Stops pynetdicom's reactor thread of an association that we opened, so that it cannot take our answers.

The library's own pause does not suffice: its thread may already be past the checkpoint, and then takes one answer.
"""

import threading
from typing import Any, cast

from pynetdicom.association import Association


class ReactorPause:
    """Replaces the reactor checkpoint of the library; the reactor thread waits here until `over` is set."""

    def __init__(self) -> None:
        self.arrived, self.over = threading.Event(), threading.Event()

    def wait(self) -> None:
        """Wait until the pause is over; the reactor calls this in every loop."""
        self.arrived.set()
        self.over.wait()

    def set(self) -> None:
        """Do nothing: only the end of the association ends the pause."""

    clear = set


def pause_reactor(association: Association) -> ReactorPause:
    """Pause the reactor thread of an established association. The caller must end the pause with `over.set()`."""
    pause = ReactorPause()
    association._reactor_checkpoint = cast(Any, pause)
    while association.is_alive() and not pause.arrived.wait(0.1):
        pass
    return pause
