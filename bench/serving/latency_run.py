"""Send images at a rate and record when each prediction and result arrived; the parts of bench/serving/latency.py.

An image's clock starts when its C-STORE-RSP (Success) was read. Orthanc stores times in whole seconds, so its list of
changes is read every POLL_S instead; arrival times are late by at most POLL_S.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from pathlib import Path

import httpx
import numpy as np
from pydicom.dataset import FileDataset

from agent.ledger.database import when
from bench.node.sender import ImageFile, associate, encoded, pdu, store
from bench.serving.latency_site import Place, write_image

POLL_S = 0.05
DRAIN_S = 180  # seconds until a queue that is not empty is an error
STEPS = ("stored", "predicted", "SR", "SC")  # of an image, in order


class Arrivals(threading.Thread):
    """A thread that records when each result reached Orthanc: `seen` is {instance: time}, two for each image."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.seen: dict[str, float] = {}
        self._client, self._stop_now = httpx.Client(base_url=url, timeout=60), threading.Event()
        self._since = self._client.get("/changes?last").json()["Last"]  # skip what was there before

    def run(self) -> None:
        while not self._stop_now.wait(POLL_S):
            answer = self._client.get(f"/changes?since={self._since}&limit=200").json()
            now, self._since = time.time(), answer["Last"]
            for change in answer["Changes"]:
                if change["ChangeType"] == "NewInstance":
                    self.seen[change["ID"]] = now

    def stop(self) -> None:
        self._stop_now.set()
        self.join()

    def by_image(self) -> dict[tuple[str, str], float]:
        """Return {(study UID, "SR" or "SC"): time}; call it after `stop`."""
        times = {}
        for instance, at in self.seen.items():
            tags = self._client.get(f"/instances/{instance}/simplified-tags").json()
            times[tags["StudyInstanceUID"], "SR" if tags["Modality"] == "SR" else "SC"] = at
        return times


class Run:
    """Images sent to one appliance, and the arrival of their results."""

    def __init__(self, place: Place, image: FileDataset, scratch: Path) -> None:
        self.place, self.image, self.scratch = place, image, scratch / "image.dcm"
        self.sent: dict[str, float] = {}  # study UID: when Success was read
        self.arrivals = Arrivals(place.orthanc)
        self.arrivals.start()

    def send(self) -> None:
        """Send one image over its own association, as a modality does."""
        study = write_image(self.image, self.scratch)
        image = ImageFile(self.scratch)
        with socket.create_connection(("127.0.0.1", self.place.port), timeout=120) as wire:
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            largest = associate(wire, "CXRLOOP", [(image.sop_class, image.syntax)])
            status = store(wire, encoded(image, 1, 1, largest))
            self.sent[study] = time.time()
            if status:
                raise SystemExit(f"the node answered {status:04X}")
            wire.sendall(struct.pack(">BxL4x", 5, 4))
            pdu(wire)

    @property
    def waiting(self) -> int:
        """The number of acknowledged images without both results in Orthanc."""
        return len(self.sent) - len(self.arrivals.seen) // 2

    def at_rate(self, rate: float, count: int) -> list[int]:
        """Send `count` images at `rate` a second without waiting for results; return how many waited after each."""
        began, queue = time.monotonic(), []
        for n in range(count):
            time.sleep(max(0.0, began + n / rate - time.monotonic()))
            self.send()
            queue.append(self.waiting)
        return queue

    def saturate(self, ahead: int, seconds: float) -> float:
        """Keep `ahead` images waiting; return the images answered a second."""
        while self.waiting < ahead:
            self.send()
        began, done = time.monotonic(), len(self.arrivals.seen)
        while time.monotonic() - began < seconds:
            if self.waiting < ahead:
                self.send()
            else:
                time.sleep(POLL_S)
        return (len(self.arrivals.seen) - done) / 2 / (time.monotonic() - began)

    def drain(self) -> None:
        """Wait until every image has its results; SystemExit after DRAIN_S."""
        deadline = time.monotonic() + DRAIN_S
        while self.waiting > 0:
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.waiting} of {len(self.sent)} images were not answered in {DRAIN_S} s")
            time.sleep(POLL_S)

    def close(self) -> None:
        self.arrivals.stop()

    def seconds(self) -> dict[str, list[float]]:
        """Return {step: seconds from Success for each image}; call it after `drain` and `close`."""
        arrived = self.arrivals.by_image()
        sql = "SELECT study_uid, stored_at, at FROM image JOIN prediction ON prediction.image = image.id"
        with self.place.site.ledger() as ledger:
            rows = {row["study_uid"]: row for row in ledger.rows(sql)}
        since_success: dict[str, list[float]] = {step: [] for step in STEPS}
        for study, sent in self.sent.items():
            row = rows[study]
            times = (when(row["stored_at"]).timestamp(), when(row["at"]).timestamp())
            for step, at in zip(STEPS, (*times, arrived[study, "SR"], arrived[study, "SC"]), strict=True):
                since_success[step].append(at - sent)
        return since_success


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Return the 50th, 95th and 99th percentile."""
    return {f"p{p}": round(float(np.percentile(seconds, p)), 3) for p in (50, 95, 99)}


def is_steady(queue: list[int]) -> bool:
    """Return whether the queue of the last third is at most one image longer than that of the middle third."""
    third = len(queue) // 3
    return float(np.mean(queue[-third:])) <= float(np.mean(queue[third : 2 * third])) + 1


def cpu_seconds(folder: Path) -> dict[str, float]:
    """Return the CPU seconds so far of each process that runs under `folder`, by part."""
    tick, seconds, owners = os.sysconf("SC_CLK_TCK"), {}, {}
    rows = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                arguments = (process / "cmdline").read_text().split("\0")
                facts = (process / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            rows.append((int(process.name), int(facts[1]), arguments, (int(facts[11]) + int(facts[12])) / tick))
    for number, _, arguments, _ in rows:
        if any(word.startswith(str(folder)) for word in arguments):
            owners[number] = arguments[arguments.index("--only") + 1] if "--only" in arguments else "supervisor"
            if arguments[0].endswith("Orthanc"):
                owners[number] = "Orthanc"
    for number, parent, _, spent in rows:
        name = owners.get(number) or ("decode" if owners.get(parent) == "learn" else None)
        if name:
            seconds[name] = seconds.get(name, 0.0) + spent
    return seconds
