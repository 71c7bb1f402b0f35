"""A running appliance for tests: `cxrloop serve` as a process, and its commands with --json."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from agent.site.site import Site

READY_S = 60
TINY = """base = "distl"
arch = "vit_tiny_patch16_depth2"
image_size = 64
local_size = 32
local_views = 2
prototypes = 64
head_hidden = 32
bottleneck = 16
class_hidden = 32
t0_epochs = 2
epochs = 2
threads = 1
checkpoint_seconds = 1
"""


class Appliance:
    """`cxrloop serve` of a site; use as a context manager."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.settings = str(site.root / "appliance.toml")
        self.log = site.root / "serve.log"
        self.process: subprocess.Popen | None = None

    def start(self) -> "Appliance":
        with self.log.open("ab") as log:
            begun = log.tell()
            command = [sys.executable, "-m", "agent.cli.main", "serve", "--config", self.settings]
            self.process = subprocess.Popen(command, stderr=log, stdout=log)
        deadline = time.monotonic() + READY_S
        while "\nready\n" not in "\n" + self.log.read_bytes()[begun:].decode(errors="replace"):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.1)
        return self

    def stop(self, how: int = signal.SIGTERM) -> float:
        """Send a signal and wait for the end; return the seconds it took."""
        assert self.process
        started = time.monotonic()
        self.process.send_signal(how)
        self.process.wait(30)
        return time.monotonic() - started

    def __enter__(self) -> "Appliance":
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process and self.process.poll() is None:
            self.stop()

    def ask(self, *words: str, code: int = 0) -> Any:
        """Run a command; return its JSON document, or its stderr when another exit code is expected."""
        done = self.run(*words)
        assert done.returncode == code, (words, done.returncode, done.stdout, done.stderr)
        return json.loads(done.stdout) if code == 0 else done.stderr

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "agent.cli.main", *words, "--json", "--config", self.settings]
        return subprocess.run(command, capture_output=True, text=True)

    def until(self, what: str, **wanted: int) -> dict[str, Any]:
        """Return `status` once it shows these numbers under `what`."""
        deadline = time.monotonic() + 60
        while True:
            answer = self.ask("status")
            if all(answer[what][key] == value for key, value in wanted.items()):
                return answer
            assert time.monotonic() < deadline, answer
            time.sleep(0.2)

    def children(self) -> dict[str, int]:
        """Return the process ids of the supervisor's parts by name."""
        assert self.process
        pids = {}
        for path in Path("/proc").iterdir():
            if not path.name.isdigit():
                continue
            try:
                parent = int(path.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
                words = path.joinpath("cmdline").read_bytes().decode().split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == self.process.pid and "agent.network.node" in words:
                pids["listen"] = int(path.name)
            elif parent == self.process.pid and "--only" in words:
                pids[words[words.index("--only") + 1]] = int(path.name)
        return pids


def alive(pid: int) -> bool:
    """Return True while a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
