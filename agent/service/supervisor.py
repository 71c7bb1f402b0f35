"""`cxrloop serve`: one process for each part, started together, restarted when one dies.

Each part can also run as a systemd unit (`--only`); this supervisor is for the demo, a container, a small site.
The parts end when the supervisor ends.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from agent.errors import Problem
from agent.network import connections, node
from agent.service.scheduler import Agent
from agent.site.config import config_path
from agent.site.site import Site
from cxrloop.process import die_with_parent
from deploy.client import Client
from deploy.errors import ProviderUnavailable
from deploy.runtime import require
from deploy.server.server import main as serve_models

log = logging.getLogger("cxrloop")

PARTS = ("listen", "infer", "learn")
STOP_S = 8  # SIGTERM must stop everything within 10 s
BACKOFF_S = (0.2, 1, 2, 5, 10, 30)  # between restarts of a part that keeps dying
STEADY_S = 60  # a part that ran this long restarts after the first back-off


@dataclass
class Part:
    """One child process and its recent restarts."""

    name: str
    command: list[str]
    child: subprocess.Popen | None = None
    deaths: int = 0
    started: float = 0.0
    due: float = field(default=0.0)


def serve(site: Site, settings: Path | None, only: tuple[str, ...], parent: int | None = None) -> None:
    """Run the named parts (all by default) until SIGTERM or SIGINT; raises Problem when one cannot start.

    `parent` is the supervisor's process id when this process is one of its parts: it ends with the supervisor.
    """
    if parent:
        die_with_parent(parent)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    parts = only or PARTS
    if "listen" in parts:
        connections.certificate_days_left(site)  # raises now: a part with a bad certificate would only keep restarting
    if "infer" in parts:
        check_runtime(site)
    if parts == ("listen",):
        os.execv(sys.executable, command("listen", settings, parent or 0))
    if len(parts) == 1:
        return run_part(site, parts[0], stop)
    _supervise(site, [Part(name, command(name, settings, os.getpid())) for name in parts], stop)


def check_part(name: str) -> None:
    """Raise Problem unless `name` is a part of the appliance."""
    if name not in PARTS:
        raise Problem(f"--only {name}: the parts are {', '.join(PARTS)} (this version has no web console)")


def check_runtime(site: Site) -> None:
    """Raise Problem, naming the missing extra, when this install cannot serve a model as configured."""
    try:
        require(site.config.infer.provider)
    except ProviderUnavailable as error:
        raise Problem(str(error)) from None


def command(name: str, settings: Path | None, parent: int) -> list[str]:
    """Return the command line of one part, which ends with the process `parent` (0: with none)."""
    where = config_path(settings)
    if name == "listen":
        return node.command(where, parent)
    words = ["serve", "--only", name, "--config", str(where), "--child", str(parent)]
    return [sys.executable, "-m", "agent.cli.main", *words]


def run_part(site: Site, name: str, stop: threading.Event) -> None:
    """Run the model server or the agent in this process until `stop`."""
    if name == "infer":
        keys = site.config.infer
        where = ["--site", str(site.root), "--host", keys.host, "--port", str(keys.port), "--provider", keys.provider]
        threads = ["--threads", str(keys.threads)] if keys.threads else []
        raise SystemExit(serve_models([*where, *threads]))
    elif name == "learn":
        agent = Agent(site)
        agent.start()
        _ready("learn", str(site.root))
        while not stop.wait(node.POLL_S):
            pass
        agent.stop()
        os._exit(0)  # a round may run in a thread for hours; its learner writes a checkpoint when we are gone
    else:
        check_part(name)


def _ready(name: str, place: str) -> None:
    sys.stderr.write(f"{name} ready on {place}\n")  # one write: four processes share this stream


def _supervise(site: Site, parts: list[Part], stop: threading.Event) -> None:
    announced = False
    while not stop.is_set():
        for part in parts:
            _keep_alive(part)
        if not announced and _answers(site, {part.name for part in parts}):
            sys.stderr.write("ready\n")
            announced = True
        stop.wait(0.2)
    for part in parts:
        if part.child:
            part.child.terminate()
    deadline = time.monotonic() + STOP_S
    for part in parts:
        if part.child:
            try:
                part.child.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                part.child.kill()
                part.child.wait()


def _keep_alive(part: Part) -> None:
    now = time.monotonic()
    if part.child and part.child.poll() is None:
        return
    if part.child:
        part.deaths = 1 if now - part.started > STEADY_S else part.deaths + 1
        wait = BACKOFF_S[min(part.deaths, len(BACKOFF_S)) - 1]
        log.warning("%s ended with code %s; restarting it in %s s", part.name, part.child.returncode, wait)
        part.child, part.due = None, now + wait
    if now >= part.due:
        part.child, part.started = subprocess.Popen(part.command), now


def _answers(site: Site, names: set[str]) -> bool:
    """Return True when the node answers C-ECHO and the model server answers, with or without a model."""
    if "listen" in names and not connections.node_answers(site):
        return False
    if "infer" in names:
        with Client(site.infer_url) as client:
            return client.state() is not None
    return True
