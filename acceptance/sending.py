"""Sending real images with dcmsend while processes are killed, until the appliance has acknowledged every one.

What dcmsend says was not stored is sent again, as a PACS does. It refuses to know labels and models.
"""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

from acceptance.driver import Appliance, Failed
from acceptance.images import Image
from acceptance.record import Record

# which process dies when this share of the images is in; the names are those of Appliance.process
KILLS = (("listen", 0.2), ("serve", 0.45), ("learn", 0.65), ("examiner", 0.8))
NAMES = {
    "listen": "the listener, while dcmsend is sending",
    "serve": "the whole `serve`, while dcmsend is sending",
    "learn": "the learn agent, while it takes images in",
    "examiner": "the examining worker, at an image",
    "infer": "the model server, while the backlog is scored",
    "learner": "the learner, in the middle of a round",
    "round": "the `round run` command, in the middle of a round",
}
ATTEMPTS = 10


class Killer:
    """Kills each process of KILLS once, when its share of the images is in."""

    def __init__(self, site: Appliance, record: Record, images: int) -> None:
        self.site, self.record = site, record
        self.due = [(name, round(share * images)) for name, share in KILLS]
        self.dead: list[str] = []

    def look(self, received: int) -> None:
        """Kill what is due now, if it runs."""
        if self.due and received >= self.due[0][1]:
            name = self.due[0][0]
            waiting = sum(1 for path in (self.site.root / "inbox").iterdir() if path.suffix == ".dcm")
            if name == "examiner" and not waiting:
                return  # it would be idle
            if self.site.kill(name):
                self.due.pop(0)
                self.record.event(f"kill -9: {NAMES[name]}", received=received, waiting_in_inbox=waiting)
                self.dead.append(name)
                if name == "learn":
                    self.again()  # dcmsend does not notice; the others end its association first

    def again(self) -> None:
        """Start again what a person starts again; wait for what the supervisor starts."""
        for name in self.dead:
            self._again(name)
        self.dead.clear()

    def _again(self, name: str) -> None:
        if name == "serve":
            took = self.site.start()
            self.record.event("serve started again by hand", ready_after_s=round(took, 1))
        elif name in ("listen", "learn"):
            took = self.site.back(name)
            self.record.event(f"{name} started again by serve", after_s=round(took, 1))


def send_all(site: Appliance, record: Record, made: dict[Path, tuple[str, Image]]) -> set[str]:
    """Send until every image has its Success; the SOP UIDs that were acknowledged. Raises Failed after ATTEMPTS."""
    killer = Killer(site, record, len(made))
    acknowledged: set[str] = set()
    pending = list(made)
    attempts: list[dict[str, Any]] = []
    while pending:
        if len(attempts) == ATTEMPTS:
            raise Failed(f"{len(pending)} images not acknowledged after {ATTEMPTS} sendings")
        began = time.monotonic()
        sender = site.dcmsend(pending)
        while sender.poll() is None:
            _look(site, killer, sender)
        seconds = time.monotonic() - began
        killer.again()
        report = site.report()
        statuses = Counter(status for status, _ in report.values())
        done = {path for path in pending if report.get(str(path), ("",))[0].startswith("0x0000")}
        acknowledged |= {made[path][0] for path in done}
        pending = [path for path in pending if path not in done]
        attempts.append({"sent": sum(statuses.values()), "seconds": round(seconds, 1), "statuses": dict(statuses)})
        record.event(f"dcmsend, sending {len(attempts)}", **attempts[-1])
    drain(site, record, killer)
    record.result["sending"] = attempts
    return acknowledged


def _look(site: Appliance, killer: Killer, sender: subprocess.Popen) -> None:
    killer.look(site.received())
    time.sleep(0.05 if killer.due else 0.5)


def drain(site: Appliance, record: Record, killer: Killer) -> None:
    """Wait until the inbox is empty; kills that are still due happen now."""
    began = time.monotonic()
    while any(path.suffix == ".dcm" for path in (site.root / "inbox").iterdir()):
        killer.look(site.received())
        killer.again()
        time.sleep(0.05)
    site.drained()
    record.event("inbox empty", seconds_after_the_last_sending=round(time.monotonic() - began, 1))
    for name, _ in killer.due:
        record.check(f"kill -9: {NAMES[name]}", False, "the moment never came")
