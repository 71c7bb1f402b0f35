"""kill -9 at random moments under load: is every image that got Success there, byte for byte, and none half?

Each time, a fresh node on the same inbox, senders at full speed, SIGKILL after a random while, then the count.
Says nothing of a power cut: the kernel lives on and writes what it was given.

    python bench/node/kill.py [--kills 100] [--senders 4] [--out bench/results/ingest_kill.json]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.node.load import Images, Sender, found, start

ROOT = Path(__file__).resolve().parents[2]
SOONEST, LATEST = 0.02, 0.8  # seconds of load before the kill


def once(inbox: Path, images: Images, senders: int, chance: random.Random) -> dict:
    """One kill: what was sent, acknowledged, there, and wrong."""
    process, port = start(inbox)
    swept = len(list((inbox / ".tmp").iterdir()))
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
    there = dict(found(path) for path in kept)
    for path in kept:
        path.unlink()
    return {
        "sent": len(sent),
        "acknowledged": len(acknowledged),
        "lost": sum(there.get(uid) != digest for uid, digest in acknowledged.items()),
        "broken": sum(sent.get(uid) != digest for uid, digest in there.items()),
        "there_unacknowledged": len(there.keys() - acknowledged.keys()),
        "half_written": len(list((inbox / ".tmp").iterdir())),
        "left_at_start": swept,
    }


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--kills", type=int, default=100)
    words.add_argument("--senders", type=int, default=4)
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--store", type=Path, help="a folder on the disk to use; default: beside this repository")
    words.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "ingest_kill.json")
    asked = words.parse_args()
    chance, images = random.Random(asked.seed), Images(asked.seed)
    with tempfile.TemporaryDirectory(prefix=".ingest-", dir=asked.store or ROOT) as folder:
        runs = [once(Path(folder), images, asked.senders, chance) for _ in range(asked.kills)]
    total = {name: sum(run[name] for run in runs) for name in runs[0]}
    print(f"{asked.kills} kills under {asked.senders} senders")
    for name, value in total.items():
        print(f"{name.replace('_', ' '):24}{value:8}")
    asked.out.parent.mkdir(exist_ok=True)
    asked.out.write_text(
        json.dumps({"kills": asked.kills, "senders": asked.senders, "total": total, "runs": runs}) + "\n"
    )
    raise SystemExit(bool(total["lost"] or total["broken"] or total["left_at_start"]))


if __name__ == "__main__":
    main()
