"""`cxrloop serve` says when its parts are up, each line whole; and a part stops when it is told to."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agent.errors import Problem
from agent.network import connections, node
from tests.conftest import make_site
from tests.support.dicom.pacs import wait_for
from tests.support.ports import free_port


def test_every_line_of_readiness_is_one_write_since_four_processes_share_the_stream(tmp_path: Path):
    """CPython writes a line and its end apart where PYTHONUNBUFFERED is set; a record socket keeps writes apart."""
    site = make_site(tmp_path / "site")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "agent.cli.main", "serve", "--config", str(site.root / "appliance.toml")]
    process = subprocess.Popen(command, stderr=theirs, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    theirs.close()
    ours.settimeout(60)
    writes: list[str] = []
    try:
        while sum("ready" in write for write in writes) < 4:  # three parts and all of them, in any order
            writes.append(ours.recv(65536).decode())
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    ready = [write for write in writes if "ready" in write]
    assert all(write.endswith("\n") and write.count("\n") == 1 for write in ready), writes


def test_a_port_that_is_taken_is_named(tmp_path):
    site = make_site(tmp_path / "site")
    place = rf"127.0.0.1:{site.config.node.port}: Address already in use"
    with socket.create_server(("127.0.0.1", site.config.node.port)), pytest.raises(Problem, match=place):
        node.listen(site, threading.Event())


def test_a_part_stops_at_a_signal_that_did_not_interrupt_its_wait(tmp_path):
    """The kernel may hand a signal to any thread; and one that comes just before the wait begins wakes nobody."""
    site = make_site(tmp_path / "site")
    stop, late = threading.Event(), threading.Event()

    def ask():
        assert wait_for(lambda: connections.node_answers(site))
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # to this thread: the waiting one is not interrupted
        if not stop.wait(5):
            late.set()
            stop.set()

    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    asking = threading.Thread(target=ask)
    asking.start()
    try:
        node.listen(site, stop)
    finally:
        signal.signal(signal.SIGTERM, before)
        asking.join()
    assert not late.is_set()


def test_the_node_loads_no_imaging_library_that_pydicom_would_bring(tmp_path: Path):
    """Its memory is promised: below 100 MB under eight senders (bench/node/ingest.py measures it)."""
    site = make_site(tmp_path / "site", node={"port": free_port()})
    process = subprocess.Popen(node.command(site.root / "appliance.toml"), stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        assert any("listen ready" in line for line in process.stderr)
        mapped = Path(f"/proc/{process.pid}/maps").read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert "numpy" in mapped and "/PIL/" not in mapped
