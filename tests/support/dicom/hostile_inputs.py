"""Data for bad inputs, and listeners that must still answer C-ECHO after each of them."""

from contextlib import contextmanager

from dicom.dataset.facts import COMPUTED_RADIOGRAPHY, DIGITAL_XRAY_PRESENTATION
from dicom.node.listener import Listener, Node
from dicom.store.inbox import Inbox
from tests.support.dicom.pacs import data_set, wait_for, xray
from tests.support.dicom.raw_scu import answers_echo

VERIFICATION = "1.2.840.10008.1.1"
DX, CR, CT = DIGITAL_XRAY_PRESENTATION, COMPUTED_RADIOGRAPHY, "1.2.840.10008.5.1.4.1.1.2"
GOOD = xray()
DATA, UID = data_set(GOOD), str(GOOD.SOPInstanceUID)
BIG = xray(7, side=900, bits=12)


@contextmanager
def running_listeners(folder):
    """Yield a function that starts a listener and returns (listener, inbox); at the end each must answer C-ECHO."""
    running = []

    def start(inbox=None, **settings):
        inbox = inbox or Inbox(folder / "inbox", settings.pop("min_free_bytes", 0))
        listener = Listener(Node(port=0, **settings), inbox)
        listener.start()
        running.append(listener)
        return listener, inbox

    yield start
    answers = [wait_for(lambda listener=listener: answers_echo(listener.port)) for listener in running]
    for listener in running:
        listener.stop()
    assert all(answers)


def file_names(inbox):
    """Return the names of all files in the inbox, temporary ones included."""
    return sorted(path.name for path in inbox.folder.rglob("*") if path.is_file())
