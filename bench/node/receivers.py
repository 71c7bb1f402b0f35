"""The receivers that bench/node/ingest.py compares: each runs in its own process and is measured from outside.

CPU and memory come from /proc, for the process and its children.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from agent.network import node
from agent.site import config
from agent.site.site import init
from bench.common.appliance import Failed, accepts, dcmtk, orthanc_command, python_path, wait_until
from tests.support.ports import free_ports

TUNED = {"TCP_BUFFER_LENGTH": "1048576", "TCP_NODELAY": "1"}
START_S, STOP_S = 30, 10

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
        settings = {
            "StorageDirectory": str(folder / "store"),
            "IndexDirectory": str(folder / "store"),
            "DicomAet": "BENCH",
            "DicomPort": port,
            "HttpServerEnabled": False,
            "SyncStorageArea": True,
            "DicomAlwaysAllowStore": True,
            "MaximumPduLength": 131072 if tuned else 16384,
        }
        return orthanc_command(settings, folder)

    return command


def _node(folder: Path, port: int) -> list[str]:
    """Return the command of this node as `cxrloop serve` runs it, after making a site for it."""
    site = init(
        folder / "site", config.checked({"site": {"findings": ["any"]}, "node": {"aet": "BENCH", "port": port}})
    )
    return node.command(site.root / "appliance.toml")


def _naive(folder: Path, port: int) -> list[str]:
    return [sys.executable, "-c", NAIVE, str(folder / "in"), str(port)]


def _storescp(folder: Path, port: int) -> list[str]:
    return [
        dcmtk("storescp"),
        "--fork",
        "+xa",
        "+B",
        "-pdu",
        "131072",
        "-aet",
        "BENCH",
        "-od",
        str(folder / "in"),
        str(port),
    ]


@dataclass(frozen=True)
class Kind:
    """A receiver that can be started; `command` takes a folder and a port, `environment` is added to ours."""

    name: str
    durable: bool
    command: Callable[[Path, int], list[str]]
    environment: dict[str, str]


KINDS = (
    Kind("ours", True, _node, {}),
    Kind("Orthanc default", True, _orthanc(False), {}),
    Kind("Orthanc tuned", True, _orthanc(True), TUNED),
    Kind("storescp --fork tuned", False, _storescp, TUNED),
    Kind("naive pynetdicom", False, _naive, {}),
)


class Receiver:
    """One running receiver with an empty folder; a context manager. `peak`: the most resident bytes seen."""

    def __init__(self, kind: Kind, folder: Path):
        self.kind, self.folder, (self.port,) = kind, folder, free_ports(1)

    def __enter__(self) -> Receiver:
        (self.folder / "in").mkdir(parents=True)
        self._log = (self.folder / "log").open("wb")
        self._process = subprocess.Popen(
            self.kind.command(self.folder, self.port),
            env=python_path() | self.kind.environment,
            cwd=self.folder,
            stdout=self._log,
            stderr=self._log,
        )
        try:
            reason = f"{self.kind.name} does not listen; its log: {self.folder / 'log'}"
            wait_until(lambda: accepts(self.port), self._process, lambda: reason, START_S)
        except Failed:
            self.__exit__()
            raise
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
        """Return the CPU seconds of the process, of its ended children and of its running children."""
        ticks = 0
        for pid in self._pids():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            ticks += sum(int(field) for field in fields[11:15])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _pids(self) -> list[int]:
        pids = [self._process.pid]
        try:
            children = Path(f"/proc/{pids[0]}/task/{pids[0]}/children").read_text().split()
        except FileNotFoundError:
            children = []
        return pids + [int(child) for child in children]

    def _memory(self) -> None:
        """Record the most resident memory of all its processes together, ten times a second."""
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._done.wait(0.1):
            resident = 0
            for pid in self._pids():
                try:
                    resident += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
                except (FileNotFoundError, ProcessLookupError, IndexError):
                    continue
            self.peak = max(self.peak, resident)
