"""The image that archive tests request, and a listener that receives it."""

from contextlib import contextmanager
from pathlib import Path

from dicom.client.archive import Image
from dicom.node.listener import Listener, Node
from dicom.store.inbox import Inbox
from tests.support.dicom.pacs import xray

REQUESTED = Image("1.2.3", "1.2.3.4", str(xray().SOPInstanceUID), "")


@contextmanager
def running_listener(folder: Path):
    """Yield (listener, inbox) of a running listener with its inbox under `folder`."""
    inbox = Inbox(folder / "inbox", 0)
    listener = Listener(Node(port=0), inbox)
    listener.start()
    try:
        yield listener, inbox
    finally:
        listener.stop()
