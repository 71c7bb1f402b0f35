"""The DICOM node as a process with nothing else in it: the listener, storage commitment, the watermark.

`cxrloop serve --only listen` becomes this process (`python -m agent.network.node SETTINGS PARENT`): what the commands and the
other parts import would take more memory than a loaded listener. Knows no model and no round.
"""

import logging
import signal
import sys
import threading
from pathlib import Path

if __name__ == "__main__":  # pydicom imports these when they are there; 8 MB that receiving never uses
    for name in ("PIL", "requests", "tqdm"):
        sys.modules[name] = None  # pyright: ignore[reportArgumentType] # None: as if it were not installed

from agent.errors import Problem
from agent.network import connections, held_copies
from agent.network.watermark import Watermark, free_bytes
from agent.site.site import Site
from cxrloop.process import die_with_parent
from dicom.node.commitment import Commitment, Pending
from dicom.node.listener import Listener

LOOK_UP_S = 1  # a wait without end sleeps through a signal that comes just before it, or to another thread
LOG_LINE = "%(asctime)s %(name)s %(levelname)s %(message)s"


def command(settings: Path, parent: int = 0) -> list[str]:
    """The command line of the node; it ends with the process `parent`, if one is named."""
    return [sys.executable, "-m", "agent.network.node", str(settings), str(parent)]


def listen(site: Site, stop: threading.Event) -> None:
    """The node in this process until `stop`: C-ECHO, C-STORE, storage commitment."""
    node, folder = connections.node(site), site.root / "node"
    commitment = Commitment(
        Pending(folder / "commitment"),
        frozenset(connections.peers(site)),
        lambda references: held_copies.held(site, references),
        lambda *report: connections.report(site, *report),
    )
    places = (site.root / "inbox", site.root / "store")  # one disk, or two
    full = Watermark(lambda: min(map(free_bytes, places)), site.config.retention.refuse_free_mb)
    listener = Listener(node, site.inbox, services=(commitment.service,), full=full)
    listener.refusals.save_to(folder / "refused.json")
    try:
        listener.start()
    except OSError as error:
        place = f"node.host, node.port = {node.host}:{node.port}"
        raise Problem(f"{place}: {error.strerror}; `ss -ltnp` says who listens there") from None
    commitment.start()
    sys.stderr.write(f"listen ready on {node.aet}@{node.host}:{listener.port}\n")
    while not stop.wait(LOOK_UP_S):
        pass
    listener.stop()
    commitment.stop()


def main() -> int:
    """Exit 1 with one line when the node can't start."""
    settings, parent = Path(sys.argv[1]), int(sys.argv[2])
    if parent:
        die_with_parent(parent)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=LOG_LINE)
    try:
        listen(Site.open(settings), stop)
    except (Problem, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
