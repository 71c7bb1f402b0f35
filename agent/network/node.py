"""The DICOM node as a process of its own: the listener, storage commitment and the watermark.

`cxrloop serve --only listen` becomes this process (`python -m agent.network.node SETTINGS PARENT`). It imports little:
the modules of commands and models would take more memory than a loaded listener.
"""

import logging
import signal
import sys
import threading
from pathlib import Path

if __name__ == "__main__":  # pydicom imports these when they are installed: 8 MB that receiving never uses
    for name in ("PIL", "requests", "tqdm"):
        sys.modules[name] = None  # pyright: ignore[reportArgumentType] # None: as if it were not installed

from agent.errors import Problem
from agent.network import commitment_check, connections
from agent.network.watermark import Watermark, free_bytes
from agent.site.site import Site
from cxrloop.process import die_with_parent
from dicom.node.commitment import Commitment, Pending
from dicom.node.listener import Listener

POLL_S = 1  # a wait without timeout misses a signal that comes just before it, or that another thread receives
LOG_FORMAT = "%(asctime)s %(name)s %(levelname)s %(message)s"


def command(settings: Path, parent: int = 0) -> list[str]:
    """Return the command line of the node; with `parent`, the node ends when that process ends."""
    return [sys.executable, "-m", "agent.network.node", str(settings), str(parent)]


def listen(site: Site, stop: threading.Event) -> None:
    """Serve C-ECHO, C-STORE and storage commitment in this process until `stop`; raises Problem."""
    node, folder = connections.node_settings(site), site.root / "node"
    commitment = Commitment(
        Pending(folder / "commitment"),
        frozenset(connections.configured_peers(site)),
        lambda references: commitment_check.check(site, references),
        lambda *report: connections.send_commitment_report(site, *report),
    )
    folders = (site.root / "inbox", site.root / "store")  # on one disk, or on two
    full = Watermark(lambda: min(map(free_bytes, folders)), site.config.retention.refuse_free_mb)
    listener = Listener(node, site.inbox, services=(commitment.service,), full=full)
    listener.refusals.save_to(folder / "refused.json")
    try:
        listener.start()
    except OSError as error:
        address = f"node.host, node.port = {node.host}:{node.port}"
        raise Problem(f"{address}: {error.strerror}; `ss -ltnp` shows which process listens there") from None
    commitment.start()
    sys.stderr.write(f"listen ready on {node.aet}@{node.host}:{listener.port}\n")
    while not stop.wait(POLL_S):
        pass
    listener.stop()
    commitment.stop()


def main() -> int:
    """Run the node; return 1 after one line on stderr when it can't start."""
    settings, parent = Path(sys.argv[1]), int(sys.argv[2])
    if parent:
        die_with_parent(parent)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=LOG_FORMAT)
    try:
        listen(Site.open(settings), stop)
    except (Problem, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
