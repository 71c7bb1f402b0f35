"""Eight associations for an hour: every acknowledged image must be on disk once, and memory must not grow.

Senders open a new association every 50 images. Other peers abort in the middle, close the connection or send nothing.
A thread empties the inbox as the intake does, and hashes each file.

    python bench/node/soak.py [--minutes 60] [--associations 8] [--pause 0] [--out bench/results/ingest_soak.json]
"""

from __future__ import annotations

import random
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.common import results
from bench.common.appliance import ROOT
from bench.node.load import ImageSource, Sender, read_stored, start
from bench.node.sender import associate, encoded
from dicom.dataset.facts import COMPUTED_RADIOGRAPHY
from dicom.dataset.part10 import EXPLICIT_LE

PER_ASSOCIATION = 50  # images of one association


def resident(pid: int) -> tuple[int, int, int]:
    """Return (bytes of resident memory, threads, open files) of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return int(fields["VmRSS"].split()[0]) << 10, int(fields["Threads"]), files


def disturb(port: int, images: ImageSource, chance: random.Random, stop: threading.Event, count: list[int]) -> None:
    """Twice a second: abort or close in the middle of an image, or open a connection and send nothing."""
    silent: list[socket.socket] = []
    while not stop.wait(0.5):
        try:
            wire = socket.create_connection(("127.0.0.1", port), timeout=10)
            if chance.random() < 0.3:
                silent.append(wire)
            else:
                largest = associate(wire, "BENCH", [(COMPUTED_RADIOGRAPHY, EXPLICIT_LE)], "TROUBLE")
                parts = encoded(images.image(chance), 1, 1, largest)
                wire.sendmsg(parts[: max(2, len(parts) // 2)])
                if chance.random() < 0.5:
                    wire.sendall(b"\x07\0\0\0\0\x04\0\0\0\0")
                wire.close()
            count[0] += 1
        except (OSError, SystemExit):
            continue
        while len(silent) > 20:
            silent.pop(0).close()
    for wire in silent:
        wire.close()


def take(inbox: Path, stop: threading.Event, stored: dict[str, list[str]]) -> None:
    """Empty the inbox until `stop` is set, and once more after that; `stored` maps UIDs to hashes."""
    while True:
        last = stop.wait(0.5)
        for path in inbox.glob("*.dcm"):
            uid, digest = read_stored(path)
            stored.setdefault(uid, []).append(digest)
            path.unlink()
        if last:
            return


def main() -> None:
    """Run the load, print and write; exit 1 for lost or doubled images, dropped senders or partial files."""
    parser = results.parser(__doc__, "ingest_soak.json")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--associations", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0, help="seconds between two images of an association")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, help="a folder on the disk to use; default: beside this repository")
    options = parser.parse_args()
    chance, images = random.Random(options.seed), ImageSource(options.seed)
    stop, taken, stored, troubles = threading.Event(), threading.Event(), {}, [0]
    with tempfile.TemporaryDirectory(prefix=".ingest-", dir=options.store or ROOT) as folder:
        inbox = Path(folder)
        process, port = start(inbox)
        load = [
            Sender(port, images, random.Random(chance.random()), stop, PER_ASSOCIATION, options.pause)
            for _ in range(options.associations)
        ]
        taker = threading.Thread(target=take, args=(inbox, taken, stored))
        trouble = threading.Thread(target=disturb, args=(port, images, random.Random(chance.random()), stop, troubles))
        try:
            for thread in (*load, taker, trouble):
                thread.start()
            began, sizes = time.monotonic(), []
            while (left := options.minutes * 60 - (time.monotonic() - began)) > 0:
                stop.wait(min(left, max(1.0, options.minutes)))
                sizes.append(resident(process.pid))
            stop.set()
            for thread in (*load, trouble):
                thread.join(120)
            seconds = time.monotonic() - began
            taken.set()
            taker.join(120)
            half = len(list((inbox / ".tmp").iterdir()))
        finally:
            stop.set()
            taken.set()
            process.terminate()
            process.wait(30)
    acknowledged = {uid: digest for sender in load for uid, digest in sender.acknowledged.items()}
    early = sizes[len(sizes) // 10]
    result = {
        "minutes": round(seconds / 60, 2),
        "associations": options.associations,
        "pause_s": options.pause,
        "acknowledged": len(acknowledged),
        "lost": sum(stored.get(uid, [""])[0] != digest for uid, digest in acknowledged.items()),
        "twice": sum(len(digests) > 1 for digests in stored.values()),
        "refused": sum(sender.refused for sender in load),
        "senders_dropped": sum(sender.dropped for sender in load),
        "troubles": troubles[0],
        "half_written_left": half,
        "images_s": round(len(acknowledged) / seconds, 1),
        "memory_mb_early": round(early[0] / 1e6, 1),
        "memory_mb_late": round(sizes[-1][0] / 1e6, 1),
        "memory_mb_peak": round(max(size for size, _, _ in sizes) / 1e6, 1),
        "threads_most": max(threads for _, threads, _ in sizes),
        "files_most": max(files for _, _, files in sizes),
    }
    for name, value in result.items():
        print(f"{name.replace('_', ' '):24}{value:10}")
    results.write(options.out, result)
    raise SystemExit(
        bool(result["lost"] or result["twice"] or result["senders_dropped"] or result["half_written_left"])
    )


if __name__ == "__main__":
    main()
