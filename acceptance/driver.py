"""One appliance under test, driven from outside: the `cxrloop` command, dcmtk's programs, signals to its processes.

It reads the ledger only to know the moment; it refuses to know images, labels, and what an answer should be.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

REPO = Path(__file__).resolve().parents[1]
AET = "CXRLOOP"
READY_S, SETTLE_S = 120, 900


class Failed(Exception):
    """A command that must work did not."""


def cxrloop(*words: str) -> list[str]:
    """The product's command line, of the environment that runs this script."""
    installed = Path(sys.executable).parent / "cxrloop"
    return [*([str(installed)] if installed.exists() else [sys.executable, "-m", "agent.cli.main"]), *words]


def dcmtk(name: str) -> str:
    """The path of a dcmtk program; pynetdicom installs others under the same names beside our Python."""
    ours = str(Path(sys.executable).parent)
    elsewhere = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if part != ours)
    found = shutil.which(name, path=elsewhere)
    if not found:
        raise Failed(f"{name} is not installed: `make peers`")
    return found


def free_port() -> int:
    """A free port on loopback whose neighbour is free too."""
    for port in range(12000, 60000, 10):
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 1))
                return port
            except OSError:
                continue
    raise Failed("no two neighbouring free ports on loopback")


@dataclass
class Appliance:
    """A site folder and its `serve` process; `answers` counts every exit code that was not 0."""

    root: Path
    port: int
    serving: subprocess.Popen | None = None
    sendings: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def make(cls, root: Path, profile: str, changed: dict[str, str]) -> Appliance:
        """`cxrloop init`, then the keys of `changed` set in appliance.toml."""
        port = free_port()
        words = ("init", str(root), "--finding", "Pneumonia", "--profile", profile, "--port", str(port), "--json")
        subprocess.run(cxrloop(*words), check=True, stdout=subprocess.DEVNULL, cwd=REPO)
        made = cls(root, port)
        made.set(changed)
        return made

    def set(self, changed: dict[str, str]) -> None:
        """Edit keys of appliance.toml, as a person would."""
        path = self.root / "appliance.toml"
        text = path.read_text("utf-8")
        for key, value in changed.items():
            text, found = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
            if found != 1:
                raise Failed(f"appliance.toml has {found} lines of {key}")
        path.write_text(text, "utf-8")

    def words(self, *words: str) -> list[str]:
        return cxrloop(*words, "--config", str(self.root / "appliance.toml"))

    def ask(self, *words: str, allow: tuple[int, ...] = (0,)) -> Any:
        """The JSON document of a command; `{"exit", "said"}` when it printed none with an allowed exit code."""
        done = subprocess.run(self.words(*words, "--json"), capture_output=True, text=True, check=False, cwd=REPO)
        if done.returncode not in allow:
            raise Failed(f"cxrloop {' '.join(words)}: exit {done.returncode}: {done.stderr.strip()[-600:]}")
        if not done.stdout.strip():
            return {"exit": done.returncode, "said": done.stderr.strip()}
        return json.loads(done.stdout)

    def status(self) -> dict[str, Any]:
        return self.ask("status", allow=(0, 3))

    def start(self) -> float:
        """`cxrloop serve` until it says ready; the seconds this took."""
        began, log = time.monotonic(), self.root / "serve.log"
        at = log.stat().st_size if log.exists() else 0
        with log.open("ab") as out:
            self.serving = subprocess.Popen(self.words("serve"), stdout=out, stderr=out, cwd=REPO)
        while b"\nready\n" not in b"\n" + log.read_bytes()[at:]:
            if self.serving.poll() is not None or time.monotonic() - began > READY_S:
                raise Failed(f"serve did not get ready: {log.read_text(errors='replace')[-600:]}")
            time.sleep(0.1)
        return time.monotonic() - began

    def stop(self) -> float:
        """SIGTERM to `serve`; the seconds until it was gone."""
        began = time.monotonic()
        if self.serving and self.serving.poll() is None:
            self.serving.terminate()
            self.serving.wait(60)
        return time.monotonic() - began

    def process(self, name: str) -> int | None:
        """The process id of a part of this site: serve, listen, infer, learn, examiner or learner."""
        if name == "serve":
            return self.serving.pid if self.serving and self.serving.poll() is None else None
        if name == "examiner":
            agent = self.process("learn")
            found = [pid for pid, parent, line in processes() if parent == agent and "spawn_main" in line]
        elif name == "learner":
            found = [pid for pid, _, line in processes() if f"-m learner {self.root}/rounds/" in line]
        else:
            mine = f"serve --only {name} --config {self.root}/appliance.toml"
            found = [pid for pid, _, line in processes() if mine in line]
        return found[0] if found else None

    def kill(self, name: str) -> bool:
        """kill -9 to a part; False when it does not run at the moment."""
        pid = self.process(name)
        if pid is None:
            return False
        os.kill(pid, signal.SIGKILL)
        if name == "serve" and self.serving:
            self.serving.wait()
        return True

    def back(self, name: str) -> float:
        """Seconds until a part runs again by itself and, for `listen` and `infer`, answers."""
        began = time.monotonic()
        answers = {"listen": self.echo, "infer": lambda: self.serves() is not None}.get(name, lambda: True)
        while self.process(name) is None or not answers():
            if time.monotonic() - began > READY_S:
                raise Failed(f"{name} did not come back")
            time.sleep(0.1)
        return time.monotonic() - began

    def echo(self) -> bool:
        """True when dcmtk's echoscu gets its answer."""
        command = [dcmtk("echoscu"), "-to", "10", "-aec", AET, "127.0.0.1", str(self.port)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def serves(self) -> str | None:
        """The bundle that the model server says it answers with."""
        try:
            said = httpx.get(f"http://127.0.0.1:{self.port + 1}/readyz", trust_env=False, timeout=30)
        except httpx.TransportError:
            return None
        return said.json()["bundle"]

    def value(self, question: str, *values: Any) -> Any:
        """One value of the ledger, read beside the appliance without a lock that could hold it up."""
        reader = sqlite3.connect(f"file:{self.root / 'ledger.db'}?mode=ro", uri=True, timeout=30)
        try:
            row = reader.execute(question, values).fetchone()
        finally:
            reader.close()
        return row[0] if row else None

    def received(self) -> int:
        """Inbox files so far: taken in or still waiting."""
        waiting = sum(path.suffix == ".dcm" for path in (self.root / "inbox").iterdir())
        return waiting + self.value("SELECT count(*) FROM receipt")

    def dcmsend(self, files: list[Path], *options: str) -> subprocess.Popen:
        """Start `dcmsend -nh` with these files; `report` reads what it did."""
        report = self.root / "dcmsend.txt"
        report.unlink(missing_ok=True)
        command = [dcmtk("dcmsend"), "-q", "-nh", *options, "-aec", AET, "--create-report-file", str(report)]
        return subprocess.Popen(
            [*command, "127.0.0.1", str(self.port), *map(str, files)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def report(self) -> dict[str, tuple[str, str]]:
        """File name -> (DIMSE status, network transfer syntax UID) as dcmsend's report has it."""
        path = self.root / "dcmsend.txt"
        text = path.read_text(errors="replace") if path.exists() else ""
        name, syntax, found = "", "", {}
        for line in text.splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "Filename":
                name = value
            elif key == "Network Xfer":
                syntax = value.partition(" ")[0]
            elif key == "DIMSE Status":
                found[name] = (value, syntax)
        return found

    def drained(self) -> dict[str, Any]:
        """`status` when the inbox is empty and, with a model in service, all stored images are scored."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            said = self.status()
            images = said["ingest"]
            if not images["inbox"] and (not said["serving"] or images["predicted"] == images["stored"]):
                return said
            if time.monotonic() > deadline:
                raise Failed(f"not settled in {SETTLE_S} s: {images}")
            time.sleep(1)


def processes() -> list[tuple[int, int, str]]:
    """(pid, parent, command line) of what runs now."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                after_name = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if after_name[0] != "Z":
                found.append((int(folder.name), int(after_name[1]), line))
    return found
