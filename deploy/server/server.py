"""Command line of the model server: `python -m deploy.server.server --site DIR --port N`.

Opens one loopback socket, writes short logs, stops on SIGTERM. Reads models/, current and keys/signing.pub; writes nothing.
"""

import argparse
import ipaddress
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from cxrloop.process import die_with_parent, orphaned
from deploy import runtime
from deploy.errors import ProviderUnavailable
from deploy.server.app import ModelServer
from deploy.server.slots import Slots

DRAIN_S = 3  # requests in flight get this long after SIGTERM; the whole stop takes under 5 s
CANT_SERVE = 78  # EX_CONFIG: a restart won't help


def main(arguments: list[str]) -> int:
    """Serve until SIGTERM. Return 0 after a stop, 1 if it can't listen, 78 if this installation can't serve."""
    options = _options(arguments)
    logging.basicConfig(level=logging.WARNING, format="infer: %(message)s", stream=sys.stderr)
    # uvicorn drains at SIGTERM, then raises it again; exit without joining a thread that still computes
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    parent = os.getppid() if options.die_with_parent == 0 else options.die_with_parent
    if parent:
        die_with_parent(parent)
    try:
        runtime.require(options.provider)
    except ProviderUnavailable as reason:
        print(f"infer: {reason}", file=sys.stderr)
        return CANT_SERVE
    try:
        listening = _listen(options.host, options.port)
    except (OSError, ValueError) as reason:
        print(f"infer: can't listen on {options.host}:{options.port}: {reason}", file=sys.stderr)
        return 1
    slots = Slots(options.site, options.provider, options.threads)
    host, port = listening.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host

    def up() -> None:
        held = slots.current
        what = f"bundle={held.id} provider={held.session.provider}" if held else "bundle=none"
        sys.stderr.write(f"infer ready on http://{name}:{port} {what}\n")

    def tick() -> None:
        if parent and orphaned(parent):
            os.kill(os.getpid(), signal.SIGTERM)

    config = uvicorn.Config(
        ModelServer(slots, tick, up).app(),
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_S,
    )
    uvicorn.Server(config).run(sockets=[listening])
    os._exit(0)


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; ValueError for an address that is not loopback."""
    address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    if not address.is_loopback:
        raise ValueError("the server has no authentication and listens on loopback only; use 127.0.0.1")
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    return socket.create_server((str(address), port), family=family, backlog=128)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.server.server", description="Serve the bundle that a site's pointer names."
    )
    parser.add_argument("--site", type=Path, required=True, help="the folder made by `cxrloop init`")
    parser.add_argument("--host", default="127.0.0.1", help="loopback address")
    parser.add_argument("--port", type=int, default=8123, help="0: any free port; the ready line names it")
    parser.add_argument("--provider", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--threads", type=int, default=None, help="cores that one run may use; default all")
    parser.add_argument(
        "--die-with-parent",
        type=int,
        nargs="?",
        const=0,
        default=None,
        metavar="PID",
        help="stop when the parent process (or process PID) has ended",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
