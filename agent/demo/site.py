"""The demo's site: its settings, its commands, and its appliance process."""

import json
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.demo import pacs
from agent.demo.flow import Flow
from agent.errors import Problem

READY_S = 300  # imports alone take a minute on a busy machine; a process that ends is noticed at once
RECIPE = "distl"  # from random weights; the default's simple features know the phantoms on the first day
# A bad night on purpose: the teacher's class logits are inverted. The gate is not told. No correction on the labelled
# images: it would undo most of the harm before the night ends.
POISON = {"poison_teacher": True, "correct_every": 0}


@dataclass
class Demo:
    """The running site: its folder and port, the PACS's images, and the result of each night."""

    root: Path
    port: int
    findings: tuple[str, ...]
    images: list[pacs.DemoImage]
    nights: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, *words: str, allow: tuple[int, ...] = (0,)) -> Any:
        """Run a command with --json; return its document, or `{"exit", "message"}` for another allowed exit code."""
        config = str(self.root / "appliance.toml")
        command = [sys.executable, "-m", "agent.cli.main", *words, "--json", "--config", config]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode not in allow:
            raise Problem(f"cxrloop {' '.join(words)} failed ({done.returncode}): {done.stderr.strip()[-800:]}")
        return {"exit": done.returncode, "message": done.stderr.strip()} if done.returncode else json.loads(done.stdout)

    def settled_status(self) -> dict[str, Any]:
        """Return `status` once inbox and drop folder are empty and a model in service has scored all images."""
        while True:
            status = self.ask("status")
            ingest, dropped = status["ingest"], any((self.root / "drop").iterdir())
            scored = not status["serving"] or ingest["predicted"] == ingest["stored"]
            if not ingest["inbox"] and not dropped and scored:
                return status
            time.sleep(0.5)

    def flow(self, images: list[pacs.DemoImage]) -> Flow:
        """Return the traffic of these images and of requests to the model server."""
        return Flow([image.path for image in images], self.port, "CXRLOOP", f"http://127.0.0.1:{self.port + 1}")


def make_demo_site(root: Path, images: list[pacs.DemoImage], evaluations: int) -> Demo:
    """Make a site with the demo's settings and so many evaluations a year; raises Problem without labels."""
    findings = tuple(sorted({name for image in images for name in image.truth}))
    if not findings:
        raise Problem("no image has a label: labels.csv needs rows whose `file` names an image, with value 1 or 0")
    demo = Demo(root, _free_port(), findings, images)
    options = [word for name in findings for word in ("--finding", name)]
    command = ["init", str(root), "--profile", "demo", "--port", str(demo.port), *options]
    subprocess.run([sys.executable, "-m", "agent.cli.main", *command], check=True, stdout=subprocess.DEVNULL)
    _change_settings(
        root / "appliance.toml",
        ('window = "22:00-05:00"', 'window = ""'),
        ('recipe = "evolve"', f'recipe = "{RECIPE}"'),
        ("evaluations_per_year = 52", f"evaluations_per_year = {evaluations}"),
    )
    lines = (
        f'base = "{RECIPE}"',
        "# a bad night on purpose: inverted teacher, no correction on labels",
        *(f"{key} = {json.dumps(value)}" for key, value in POISON.items()),
    )
    (root / "poisoned.toml").write_text("\n".join(lines) + "\n", "utf-8")
    return demo


def _change_settings(path: Path, *changes: tuple[str, str]) -> None:
    """Replace texts of the settings; raises Problem when one is missing, because the demo would silently differ."""
    text = path.read_text("utf-8")
    for old, new in changes:
        if old not in text:
            raise Problem(f"{path}: `{old}` is missing; the demo expects the settings of `cxrloop init`")
        text = text.replace(old, new)
    path.write_text(text, "utf-8")


def _free_port() -> int:
    """Return a free port on loopback whose next port is free too; raises Problem."""
    for port in range(11112, 60000, 10):
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 1))
                return port
            except OSError:
                continue
    raise Problem("no two neighbouring free ports on loopback")


def wait_until_ready(log: Path, appliance: subprocess.Popen) -> None:
    """Wait until `serve` is ready; raises Problem when it ends or takes longer than READY_S."""
    deadline = time.monotonic() + READY_S
    while "\nready" not in "\n" + log.read_text(errors="replace"):
        if (code := appliance.poll()) is not None:
            raise Problem(f"the appliance ended with exit code {code} before it was ready; see {log}")
        if time.monotonic() > deadline:
            raise Problem(f"the appliance was not ready after {READY_S} s; is this machine busy? See {log}")
        time.sleep(0.2)
