"""`cxrloop serve` says when its parts are up: each line arrives whole."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from conftest import make_site


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
