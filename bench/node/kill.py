"""kill -9 at random moments under load: every acknowledged image must be on disk, byte for byte, and none in part.

Each round: a new node on the same inbox, senders at full speed, SIGKILL after a random time, then the count.
It does not show a power cut: the kernel survives and writes what it holds.

    python bench/node/kill.py [--kills 100] [--senders 4] [--out bench/results/ingest_kill.json]
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.common import results
from bench.common.appliance import ROOT
from bench.node.load import ImageSource, Sender, read_stored, start

SOONEST, LATEST = 0.02, 0.8  # seconds of load before the kill


def kill_once(inbox: Path, images: ImageSource, senders: int, chance: random.Random) -> dict:
    """Kill the node once; return counts of images sent, acknowledged, lost and damaged."""
    process, port = start(inbox)
    leftover = len(list((inbox / ".tmp").iterdir()))
    stop = threading.Event()
    load = [Sender(port, images, random.Random(chance.random()), stop) for _ in range(senders)]
    try:
        for sender in load:
            sender.start()
        for sender in load:
            sender.associated.wait(30)
        stop.wait(chance.uniform(SOONEST, LATEST))
    finally:
        process.kill()
        process.wait()
        stop.set()
    for sender in load:
        sender.join(60)
    sent = {uid: digest for sender in load for uid, digest in sender.sent.items()}
    acknowledged = {uid: digest for sender in load for uid, digest in sender.acknowledged.items()}
    kept = list(inbox.glob("*.dcm"))
    stored = dict(read_stored(path) for path in kept)
    for path in kept:
        path.unlink()
    return {
        "sent": len(sent),
        "acknowledged": len(acknowledged),
        "lost": sum(stored.get(uid) != digest for uid, digest in acknowledged.items()),
        "broken": sum(sent.get(uid) != digest for uid, digest in stored.items()),
        "there_unacknowledged": len(stored.keys() - acknowledged.keys()),
        "half_written": len(list((inbox / ".tmp").iterdir())),
        "left_at_start": leftover,
    }


def main() -> None:
    """Kill the node many times, print the sums and write; exit 1 for any lost or damaged image."""
    parser = results.parser(__doc__, "ingest_kill.json")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--senders", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, help="a folder on the disk to use; default: beside this repository")
    options = parser.parse_args()
    chance, images = random.Random(options.seed), ImageSource(options.seed)
    with tempfile.TemporaryDirectory(prefix=".ingest-", dir=options.store or ROOT) as folder:
        runs = [kill_once(Path(folder), images, options.senders, chance) for _ in range(options.kills)]
    total = {name: sum(run[name] for run in runs) for name in runs[0]}
    print(f"{options.kills} kills under {options.senders} senders")
    for name, value in total.items():
        print(f"{name.replace('_', ' '):24}{value:8}")
    results.write(options.out, {"kills": options.kills, "senders": options.senders, "total": total, "runs": runs})
    raise SystemExit(bool(total["lost"] or total["broken"] or total["left_at_start"]))


if __name__ == "__main__":
    main()
