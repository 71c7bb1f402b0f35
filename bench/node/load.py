"""What bench/node/kill.py and bench/node/soak.py share: new images on demand, senders, a node in its own process.

Every image has its own UID and its own bytes, so that a mix-up is visible.
"""

from __future__ import annotations

import hashlib
import io
import random
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pydicom.uid import UID

from bench.common.appliance import accepts, python_path, wait_until
from bench.node.sender import ImageFile, associate, encoded, pdu, store
from dicom.dataset.facts import COMPUTED_RADIOGRAPHY
from dicom.dataset.part10 import EXPLICIT_LE, open_envelope
from dicom.phantom.wrap import wrap
from tests.support.ports import free_ports

UID_ROOT = "1.2.826.0.1.3680043.8.498.77."
DIGITS = 12  # of the last component; every UID has the length of the one it replaces
SIDES = (300, 700, 1400)  # pixels: 0.2, 1 and 4 MB
NODE = """
import logging, sys, threading
from pathlib import Path
from dicom.store.inbox import Inbox
from dicom.node.listener import Listener, Node
listener = Listener(Node(aet="BENCH", port=int(sys.argv[2])), Inbox(Path(sys.argv[1])))
listener.start()
threading.Event().wait()
"""


class ImageSource:
    """New data sets on demand: a template with a new UID and new last pixels each time. Safe in several threads."""

    def __init__(self, seed: int):
        rng, self._count = np.random.default_rng(seed), 0
        self._templates = []
        for side in SIDES:
            ds = wrap(rng.integers(0, 4096, (side, side)).astype(np.uint16), "LOAD", bits=12, modality="CR")
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID(UID_ROOT + "1" * DIGITS)
            buffer = io.BytesIO()
            ds.save_as(buffer, enforce_file_format=True)
            buffer.seek(0)
            self._templates.append(buffer.getvalue()[open_envelope(buffer).offset :])
        self._lock = threading.Lock()

    def image(self, chance: random.Random) -> ImageFile:
        with self._lock:
            self._count += 1
            uid = f"{UID_ROOT}1{self._count:0{DIGITS - 1}d}"
        plain = chance.choice(self._templates).replace((UID_ROOT + "1" * DIGITS).encode(), uid.encode(), 1)
        made = ImageFile.__new__(ImageFile)
        made.sop_class, made.sop_uid, made.syntax = COMPUTED_RADIOGRAPHY, uid, EXPLICIT_LE
        made.data = memoryview(plain[:-4] + struct.pack("<HH", chance.getrandbits(12), chance.getrandbits(12)))
        return made


def sha256(data: bytes | memoryview) -> str:
    """Return the hash in hex."""
    return hashlib.sha256(data).hexdigest()


class Sender(threading.Thread):
    """Sends until the node is gone or `stop` is set; `sent` and `acknowledged` map UIDs to hashes."""

    def __init__(
        self, port: int, images: ImageSource, chance: random.Random, stop: threading.Event,
        per_association: int = 1 << 30, pause: float = 0,
    ):  # fmt: skip
        super().__init__(daemon=True)
        self._pause = pause  # seconds between two images
        self._port, self._images, self._chance, self._stop_event, self._per_association = (
            port,
            images,
            chance,
            stop,
            per_association,
        )
        self.sent: dict[str, str] = {}
        self.acknowledged: dict[str, str] = {}
        self.refused = self.dropped = 0
        self.associated = threading.Event()

    def run(self) -> None:
        while not self._stop_event.is_set():
            try:
                self._association()
            except (OSError, SystemExit, struct.error):
                self.dropped += 1
                return

    def _association(self) -> None:
        with socket.create_connection(("127.0.0.1", self._port), timeout=60) as wire:
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            largest = associate(wire, "BENCH", [(COMPUTED_RADIOGRAPHY, EXPLICIT_LE)])
            self.associated.set()
            for n in range(self._per_association):
                if self._stop_event.is_set():
                    break
                image = self._images.image(self._chance)
                self.sent[image.sop_uid] = digest = sha256(image.data)
                if store(wire, encoded(image, 1, n % 60_000 + 1, largest)) == 0:
                    self.acknowledged[image.sop_uid] = digest
                else:
                    self.refused += 1
                self._stop_event.wait(self._pause)
            wire.sendall(struct.pack(">BxL4x", 5, 4))
            pdu(wire)


def start(inbox: Path) -> tuple[subprocess.Popen, int]:
    """Start a node on an inbox in a process of its own; return (process, port) when it listens."""
    (port,) = free_ports(1)
    process = subprocess.Popen([sys.executable, "-c", NODE, str(inbox), str(port)], env=python_path())
    wait_until(lambda: accepts(port), process, lambda: "the node does not listen", seconds=60)
    return process, port


def read_stored(path: Path) -> tuple[str, str]:
    """Return (SOP Instance UID, sha256 of the data set) of a file in the inbox."""
    image = ImageFile(path)
    return image.sop_uid, sha256(image.data)
