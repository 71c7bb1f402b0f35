"""One appliance under test, driven from outside: the `cxrloop` command, dcmtk's programs, signals to its processes.

It reads the ledger to find the moment of a kill; every answer comes from a command.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.common.appliance import ROOT, Failed, dcmtk, is_ready, wait_until
from tests.support.ports import free_ports

AET = "CXRLOOP"
READY_S, SETTLE_S = 120, 900


def cxrloop(*arguments: str) -> list[str]:
    """Return the product's command line, of the environment that runs this script."""
    installed = Path(sys.executable).parent / "cxrloop"
    return [*([str(installed)] if installed.exists() else [sys.executable, "-m", "agent.cli.main"]), *arguments]


@dataclass
class Appliance:
    """A site folder and its `serve` process."""

    root: Path
    port: int
    serving: subprocess.Popen | None = None

    @classmethod
    def make(cls, root: Path, profile: str, changed: dict[str, str]) -> Appliance:
        """Run `cxrloop init`, then set the keys of `changed` in appliance.toml."""
        port = free_ports(2)[0]
        arguments = ("init", str(root), "--finding", "Pneumonia", "--profile", profile, "--port", str(port), "--json")
        subprocess.run(cxrloop(*arguments), check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        site = cls(root, port)
        site.set(changed)
        return site

    def set(self, changed: dict[str, str]) -> None:
        """Change keys in appliance.toml; each must stand there once."""
        path = self.root / "appliance.toml"
        text = path.read_text("utf-8")
        for key, value in changed.items():
            text, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
            if count != 1:
                raise Failed(f"appliance.toml has {count} lines of {key}")
        path.write_text(text, "utf-8")

    def command(self, *arguments: str) -> list[str]:
        """Return a `cxrloop` command line for this site."""
        return cxrloop(*arguments, "--config", str(self.root / "appliance.toml"))

    def ask(self, *arguments: str, allow: tuple[int, ...] = (0,)) -> Any:
        """Return the JSON document of a command, or {"exit", "message"} if it printed none; Failed for other exit codes."""
        done = subprocess.run(self.command(*arguments, "--json"), capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode not in allow:
            raise Failed(f"cxrloop {' '.join(arguments)}: exit {done.returncode}: {done.stderr.strip()[-600:]}")
        if not done.stdout.strip():
            return {"exit": done.returncode, "message": done.stderr.strip()}
        return json.loads(done.stdout)

    def status(self) -> dict[str, Any]:
        """Return `cxrloop status`."""
        return self.ask("status", allow=(0, 3))

    def start(self) -> float:
        """Start `cxrloop serve`; return the seconds until it was ready."""
        began, log = time.monotonic(), self.root / "serve.log"
        at = log.stat().st_size if log.exists() else 0
        with log.open("ab") as out:
            self.serving = subprocess.Popen(self.command("serve"), stdout=out, stderr=out, cwd=ROOT)
        wait_until(lambda: is_ready(log, at), self.serving, lambda: log.read_text(errors="replace")[-600:], READY_S)
        return time.monotonic() - began

    def stop(self) -> float:
        """Send SIGTERM to `serve`; return the seconds until it ended."""
        began = time.monotonic()
        if self.serving and self.serving.poll() is None:
            self.serving.terminate()
            self.serving.wait(60)
        return time.monotonic() - began

    def process(self, name: str) -> int | None:
        """Return the process id of a part: serve, listen, infer, learn, examiner or learner; None if it does not run."""
        if name == "serve":
            return self.serving.pid if self.serving and self.serving.poll() is None else None
        if name == "examiner":
            agent = self.process("learn")
            pids = [pid for pid, parent, line in processes() if parent == agent and "spawn_main" in line]
        elif name == "learner":
            pids = [pid for pid, _, line in processes() if f"-m learner {self.root}/rounds/" in line]
        else:
            program = "-m agent.network.node" if name == "listen" else f"serve --only {name} --config"
            command_line = f"{program} {self.root}/appliance.toml"
            pids = [pid for pid, _, line in processes() if command_line in line]
        return pids[0] if pids else None

    def kill(self, name: str) -> bool:
        """Send SIGKILL to a part; return False if it does not run."""
        pid = self.process(name)
        if pid is None:
            return False
        os.kill(pid, signal.SIGKILL)
        if name == "serve" and self.serving:
            self.serving.wait()
        return True

    def wait_for(self, name: str) -> float:
        """Return the seconds until a part runs again without help and, for `listen` and `infer`, answers."""
        began = time.monotonic()
        answers = {"listen": self.echo, "infer": lambda: self.bundle_of_server() is not None}.get(name, lambda: True)
        wait_until(
            lambda: self.process(name) is not None and answers(), None, lambda: f"{name} was not restarted", READY_S
        )
        return time.monotonic() - began

    def echo(self) -> bool:
        """Return whether dcmtk's echoscu gets an answer."""
        command = [dcmtk("echoscu"), "-to", "10", "-aec", AET, "127.0.0.1", str(self.port)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def bundle_of_server(self) -> str | None:
        """Return the bundle in service by the model server; None if it does not answer."""
        try:
            answer = httpx.get(f"http://127.0.0.1:{self.port + 1}/readyz", trust_env=False, timeout=30)
        except httpx.TransportError:
            return None
        return answer.json()["bundle"]

    def value(self, question: str, *values: Any) -> Any:
        """Return one value of the ledger, read without a lock that could block the appliance."""
        reader = sqlite3.connect(f"file:{self.root / 'ledger.db'}?mode=ro", uri=True, timeout=30)
        try:
            row = reader.execute(question, values).fetchone()
        finally:
            reader.close()
        return row[0] if row else None

    def received(self) -> int:
        """Return the number of files received so far: examined or still in the inbox."""
        waiting = sum(path.suffix == ".dcm" for path in (self.root / "inbox").iterdir())
        return waiting + self.value("SELECT count(*) FROM receipt")

    def dcmsend(self, files: list[Path], *options: str) -> subprocess.Popen:
        """Start `dcmsend -nh` with these files; `report` reads the outcome."""
        report = self.root / "dcmsend.txt"
        report.unlink(missing_ok=True)
        command = [dcmtk("dcmsend"), "-q", "-nh", *options, "-aec", AET, "--create-report-file", str(report)]
        return subprocess.Popen(
            [*command, "127.0.0.1", str(self.port), *map(str, files)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def report(self) -> dict[str, tuple[str, str]]:
        """Return file name -> (DIMSE status, network transfer syntax UID) from dcmsend's report."""
        path = self.root / "dcmsend.txt"
        text = path.read_text(errors="replace") if path.exists() else ""
        name, syntax, statuses = "", "", {}
        for line in text.splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "Filename":
                name = value
            elif key == "Network Xfer":
                syntax = value.partition(" ")[0]
            elif key == "DIMSE Status":
                statuses[name] = (value, syntax)
        return statuses

    def drained(self) -> dict[str, Any]:
        """Wait until the inbox is empty and, with a model in service, all images are scored; return `status`."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            status = self.status()
            images = status["ingest"]
            if not images["inbox"] and (not status["serving"] or images["predicted"] == images["stored"]):
                return status
            if time.monotonic() > deadline:
                raise Failed(f"not settled in {SETTLE_S} s: {images}")
            time.sleep(1)


def processes() -> list[tuple[int, int, str]]:
    """Return (pid, parent, command line) of every running process."""
    running = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                after_name = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if after_name[0] != "Z":
                running.append((int(folder.name), int(after_name[1]), line))
    return running
