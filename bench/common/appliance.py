"""Programs that benchmarks, acceptance runs and tools start: `cxrloop serve`, Orthanc; free ports; waiting for them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 180
POLL_S = 0.1


class Failed(Exception):
    """A step of a run that cannot continue; the message names the command and its output."""


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen | None = None,
    reason: Callable[[], object] = lambda: "", seconds: float = WAIT_S,
) -> None:  # fmt: skip
    """Return when `condition` is true; Failed after `seconds`, or when `process` ends, with the text of `reason`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            raise Failed(f"not ready: {reason()}")
        time.sleep(POLL_S)


def accepts(port: int) -> bool:
    """Return whether a process accepts connections on this port of loopback."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def responds(url: str) -> bool:
    """Return whether the URL answers 200."""
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def python_path() -> dict[str, str]:
    """Return this process's environment in which the packages of this checkout come first."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def dcmtk(name: str) -> str:
    """Return the path of a dcmtk program; pynetdicom installs programs of the same names beside Python."""
    beside_python = str(Path(sys.executable).parent)
    elsewhere = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if part != beside_python)
    program = shutil.which(name, path=elsewhere)
    if not program:
        raise Failed(f"{name} is not installed: `make peers`")
    return program


def orthanc_command(settings: dict[str, object], folder: Path) -> list[str]:
    """Write orthanc.json to `folder`; return the command that runs Orthanc with it, on loopback, without plugins."""
    settings = {
        "Name": "Orthanc",
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "Plugins": [],
    } | settings
    (folder / "orthanc.json").write_text(json.dumps(settings))
    return [shutil.which("Orthanc") or "/usr/sbin/Orthanc", str(folder / "orthanc.json")]


@contextmanager
def orthanc(folder: Path, http_port: int, dicom_port: int) -> Iterator[str]:
    """Run an Orthanc with AE title ORTHANC; yield its URL."""
    folder.mkdir()
    command = orthanc_command({"HttpPort": http_port, "DicomPort": dicom_port, "DicomAet": "ORTHANC"}, folder)
    url = f"http://127.0.0.1:{http_port}"
    with running(command) as process:
        wait_until(lambda: responds(f"{url}/system"), process)
        yield url


@contextmanager
def serving(site: Path) -> Iterator[None]:
    """Run `cxrloop serve` of a site folder; yields when it is ready."""
    log = site / "serve.log"
    command = [sys.executable, "-m", "agent.cli.main", "serve", "--config", str(site / "appliance.toml")]
    with log.open("wb") as output, running(command, output) as process:
        wait_until(lambda: is_ready(log), process, log.read_text)
        yield


def is_ready(log: Path, start: int = 0) -> bool:
    """Return whether `cxrloop serve` wrote its ready line to the log, from byte `start` on."""
    return b"\nready\n" in b"\n" + log.read_bytes()[start:]


@contextmanager
def running(command: list[str], output: object = subprocess.DEVNULL) -> Iterator[subprocess.Popen]:
    """Run a command in this checkout; terminate it after the block."""
    process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, env=python_path())  # type: ignore[arg-type]
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)
