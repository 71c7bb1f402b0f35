"""The receivers that bench/node/ingest.py compares: each a process of its own, started, measured from outside, stopped.

CPU and memory come from /proc, of the process and its children; knows nothing of images and senders.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from agent.network import node
from agent.site import config
from agent.site.site import init

TUNED = {"TCP_BUFFER_LENGTH": "1048576", "TCP_NODELAY": "1"}
STOP_S = 10
ROOT = Path(__file__).resolve().parents[2]

NAIVE = """
import sys
from pathlib import Path
from pynetdicom import AE, evt, AllStoragePresentationContexts, ALL_TRANSFER_SYNTAXES
def store(event):
    image = event.dataset
    image.file_meta = event.file_meta
    image.save_as(Path(sys.argv[1]) / f"{event.request.AffectedSOPInstanceUID}.dcm", enforce_file_format=True)
    return 0
entity = AE("BENCH")
for context in AllStoragePresentationContexts:
    entity.add_supported_context(context.abstract_syntax, ALL_TRANSFER_SYNTAXES)
entity.start_server(("127.0.0.1", int(sys.argv[2])), evt_handlers=[(evt.EVT_C_STORE, store)])
"""


def _orthanc(tuned: bool) -> Callable[[Path, int], list[str]]:
    def command(folder: Path, port: int) -> list[str]:
        keys = {
            "Name": "BENCH",
            "StorageDirectory": str(folder / "store"),
            "IndexDirectory": str(folder / "store"),
            "DicomAet": "BENCH",
            "DicomPort": port,
            "HttpServerEnabled": False,
            "RemoteAccessAllowed": False,
            "Plugins": [],
            "SyncStorageArea": True,
            "DicomAlwaysAllowStore": True,
            "MaximumPduLength": 131072 if tuned else 16384,
        }
        (folder / "orthanc.json").write_text(json.dumps(keys))
        return [shutil.which("Orthanc") or "/usr/sbin/Orthanc", str(folder / "orthanc.json")]

    return command


def _served(folder: Path, port: int) -> list[str]:
    """Our node as `cxrloop serve` runs it, in a site of its own."""
    site = init(
        folder / "site", config.checked({"site": {"findings": ["any"]}, "node": {"aet": "BENCH", "port": port}})
    )
    return node.command(site.root / "appliance.toml")


def _naive(folder: Path, port: int) -> list[str]:
    return [sys.executable, "-c", NAIVE, str(folder / "in"), str(port)]


def _storescp(folder: Path, port: int) -> list[str]:
    return ["storescp", "--fork", "+xa", "+B", "-pdu", "131072", "-aet", "BENCH", "-od", str(folder / "in"), str(port)]


@dataclass(frozen=True)
class Kind:
    name: str
    durable: bool
    command: Callable[[Path, int], list[str]]
    environment: dict[str, str]


KINDS = (
    Kind("ours", True, _served, {}),
    Kind("Orthanc default", True, _orthanc(False), {}),
    Kind("Orthanc tuned", True, _orthanc(True), TUNED),
    Kind("storescp --fork tuned", False, _storescp, TUNED),
    Kind("naive pynetdicom", False, _naive, {}),
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Receiver:
    """One running receiver with an empty folder; a context manager."""

    def __init__(self, kind: Kind, folder: Path):
        self.kind, self.folder, self.port = kind, folder, free_port()

    def __enter__(self) -> Receiver:
        (self.folder / "in").mkdir(parents=True)
        self._log = (self.folder / "log").open("wb")
        self._process = subprocess.Popen(
            self.kind.command(self.folder, self.port),
            env={**os.environ, **self.kind.environment, "PYTHONPATH": str(ROOT)},
            cwd=self.folder,
            stdout=self._log,
            stderr=self._log,
        )
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    self.__exit__()
                    raise SystemExit(f"{self.kind.name} does not listen; its log: {self.folder / 'log'}") from None
                time.sleep(0.05)
        self._done, self.peak = threading.Event(), 0
        self._watch = threading.Thread(target=self._memory, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if hasattr(self, "_done"):
            self._done.set()
            self._watch.join()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def cpu(self) -> float:
        """Seconds of CPU of the process, of its children that ended, and of those that live."""
        ticks = 0
        for pid in self._pids():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            ticks += sum(int(field) for field in fields[11:15])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _pids(self) -> list[int]:
        mine = [self._process.pid]
        try:
            children = Path(f"/proc/{mine[0]}/task/{mine[0]}/children").read_text().split()
        except FileNotFoundError:
            children = []
        return mine + [int(child) for child in children]

    def _memory(self) -> None:
        """Watch the resident memory of all its processes together, ten times a second."""
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._done.wait(0.1):
            resident = 0
            for pid in self._pids():
                try:
                    resident += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
                except (FileNotFoundError, ProcessLookupError, IndexError):
                    continue
            self.peak = max(self.peak, resident)
