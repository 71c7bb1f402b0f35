"""`cxrloop serve` says when its parts are up: each line arrives whole."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from conftest import free_port, make_site

from agent import node


def test_every_line_of_readiness_is_one_write_since_four_processes_share_the_stream(tmp_path: Path):
    """CPython writes a line and its end apart where PYTHONUNBUFFERED is set; a record socket keeps writes apart."""
    site = make_site(tmp_path / "site")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "agent.cli", "serve", "--config", str(site.root / "appliance.toml")]
    process = subprocess.Popen(command, stderr=theirs, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    theirs.close()
    ours.settimeout(60)
    writes: list[str] = []
    try:
        while not writes or writes[-1].strip() != "ready":
            writes.append(ours.recv(65536).decode())
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    ready = [write for write in writes if "ready" in write]
    assert len(ready) == 4 and all(write.endswith("\n") and write.count("\n") == 1 for write in ready), writes


def test_the_node_loads_no_imaging_library_that_pydicom_would_bring(tmp_path: Path):
    """Its memory is promised: below 100 MB under eight senders (bench/ingest.py measures it)."""
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
