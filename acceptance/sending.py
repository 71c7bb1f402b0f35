"""Send real images with dcmsend while processes are killed, until the appliance has acknowledged every image.

Images that dcmsend reports as not stored are sent again, as a PACS does.
"""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

from acceptance.driver import Appliance
from acceptance.images import Image
from acceptance.record import Record
from bench.common.appliance import Failed

# (process, share of the images received when it is killed); names as in Appliance.process
KILLS = (("listen", 0.2), ("serve", 0.45), ("learn", 0.65), ("examiner", 0.8))
NAMES = {
    "listen": "the listener, while dcmsend is sending",
    "serve": "the whole `serve`, while dcmsend is sending",
    "learn": "the learn agent, while it examines images",
    "examiner": "the examining worker, at an image",
    "infer": "the model server, while the backlog is scored",
    "learner": "the learner, in the middle of a round",
    "round": "the `round run` command, in the middle of a round",
}
ATTEMPTS = 10


class Killer:
    """Kills each process of KILLS once, when its share of the images is received."""

    def __init__(self, site: Appliance, record: Record, images: int) -> None:
        self.site, self.record = site, record
        self.due = [(name, round(share * images)) for name, share in KILLS]
        self.killed: list[str] = []

    def kill_due(self, received: int) -> None:
        """Kill the process that is due, if it runs."""
        if self.due and received >= self.due[0][1]:
            name = self.due[0][0]
            waiting = sum(1 for path in (self.site.root / "inbox").iterdir() if path.suffix == ".dcm")
            if name == "examiner" and not waiting:
                return  # it is idle
            if self.site.kill(name):
                self.due.pop(0)
                self.record.event(f"kill -9: {NAMES[name]}", received=received, waiting_in_inbox=waiting)
                self.killed.append(name)
                if name == "learn":
                    self.restart_all()  # dcmsend continues; the other kills end its association first

    def restart_all(self) -> None:
        """Start `serve` again as a person does; wait for the parts that `serve` restarts."""
        for name in self.killed:
            self._restart(name)
        self.killed.clear()

    def _restart(self, name: str) -> None:
        if name == "serve":
            seconds = self.site.start()
            self.record.event("serve started again by hand", ready_after_s=round(seconds, 1))
        elif name in ("listen", "learn"):
            seconds = self.site.wait_for(name)
            self.record.event(f"{name} started again by serve", after_s=round(seconds, 1))


def send_all(site: Appliance, record: Record, files: dict[Path, tuple[str, Image]]) -> set[str]:
    """Send until every image is acknowledged; return the acknowledged SOP UIDs. Raises Failed after ATTEMPTS."""
    killer = Killer(site, record, len(files))
    acknowledged: set[str] = set()
    pending = list(files)
    attempts: list[dict[str, Any]] = []
    while pending:
        if len(attempts) == ATTEMPTS:
            raise Failed(f"{len(pending)} images not acknowledged after {ATTEMPTS} sendings")
        began = time.monotonic()
        sender = site.dcmsend(pending)
        while sender.poll() is None:
            _kill_when_due(site, killer, sender)
        seconds = time.monotonic() - began
        killer.restart_all()
        report = site.report()
        statuses = Counter(status for status, _ in report.values())
        done = {path for path in pending if report.get(str(path), ("",))[0].startswith("0x0000")}
        acknowledged |= {files[path][0] for path in done}
        pending = [path for path in pending if path not in done]
        attempts.append({"sent": sum(statuses.values()), "seconds": round(seconds, 1), "statuses": dict(statuses)})
        record.event(f"dcmsend, sending {len(attempts)}", **attempts[-1])
    drain(site, record, killer)
    record.result["sending"] = attempts
    return acknowledged


def _kill_when_due(site: Appliance, killer: Killer, sender: subprocess.Popen) -> None:
    killer.kill_due(site.received())
    time.sleep(0.05 if killer.due else 0.5)


def drain(site: Appliance, record: Record, killer: Killer) -> None:
    """Wait until the inbox is empty; run the kills that are still due."""
    began = time.monotonic()
    while any(path.suffix == ".dcm" for path in (site.root / "inbox").iterdir()):
        killer.kill_due(site.received())
        killer.restart_all()
        time.sleep(0.05)
    site.drained()
    record.event("inbox empty", seconds_after_the_last_sending=round(time.monotonic() - began, 1))
    for name, _ in killer.due:
        record.check(f"kill -9: {NAMES[name]}", False, "no suitable moment")
