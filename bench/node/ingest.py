"""How fast images come in, durably: ours beside Orthanc, storescp, a naive handler and the disk itself, in one run.

Every round runs every receiver once, in changing order, so that a busy neighbour hits all of them; figures are
medians over rounds, ratios are of pairs within a round. Durable means fsync before Success; the two that are not are
marked. The images are RG1 and RG3 of pydicom-data with new UIDs; they lie in memory, the receivers' folders on disk.

    python bench/node/ingest.py [--quick] [--rounds 5] [--objects 32] [--store FOLDER] [--out bench/results/ingest.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.node.echo import echo_table, echoes
from bench.node.images import compressed, uncompressed
from bench.node.receivers import KINDS, Receiver
from bench.node.table import table

ROOT = Path(__file__).resolve().parents[2]

DISK = """
import json, os, sys, time
from pathlib import Path
from cxrloop.durable import sync_folder
folder, images = Path(sys.argv[1]), [Path(path).read_bytes() for path in sys.argv[2:]]
print("ready", flush=True)
sys.stdin.readline()
started, latencies = time.monotonic(), []
for n, image in enumerate(images):
    first = time.monotonic()
    temp = folder / f"{os.getpid()}-{n}.tmp"
    with temp.open("xb", buffering=0) as file:
        file.write(image)
        os.fsync(file.fileno())
    temp.rename(temp.with_suffix(".dcm"))
    sync_folder(folder)
    latencies.append(time.monotonic() - first)
print(json.dumps({"associate": 0, "started": started, "ended": time.monotonic(), "latencies": latencies,
                  "bytes": sum(map(len, images)), "bad": 0}))
"""


def together(commands: list[list[str]]) -> list[dict]:
    """Start the senders, let all of them go at once when every one is ready, and collect what they say."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for command in commands
    ]
    for process in running:
        if process.stdout.readline() != "ready\n":  # type: ignore[union-attr]
            raise SystemExit(f"a sender did not get ready: {process.args}")
    for process in running:
        process.stdin.write("go\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    return [json.loads(process.communicate(timeout=600)[0]) for process in running]


def dealt(images: list[Path], hands: int) -> list[list[str]]:
    return [[str(path) for path in images[n::hands]] for n in range(hands)]


def figures(said: list[dict], cpu: float, peak: int) -> dict:
    """One cell of the table from what its senders said."""
    seconds = max(one["ended"] for one in said) - min(one["started"] for one in said)
    size = sum(one["bytes"] for one in said)
    latencies = sorted(latency for one in said for latency in one["latencies"])
    return {
        "mb_s": size / 1e6 / seconds,
        "objects_s": len(latencies) / seconds,
        "p50_ms": 1e3 * median(latencies),
        "p99_ms": 1e3 * latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))],
        "cpu_ms_mb": 1e3 * cpu / (size / 1e6),
        "peak_mb": peak / 1e6,
        "associate_ms": 1e3 * median(one["associate"] for one in said),
        "bad": sum(one["bad"] for one in said),
    }


def raw(receiver: Receiver, images: list[Path], associations: int) -> dict:
    sender = [sys.executable, str(ROOT / "bench" / "node" / "sender.py"), "127.0.0.1", str(receiver.port), "BENCH"]
    before = receiver.cpu()
    said = together([[*sender, *hand] for hand in dealt(images, associations)])
    return figures(said, receiver.cpu() - before, receiver.peak)


def dcmsend(receiver: Receiver, images: list[Path], associations: int) -> dict:
    """With dcmtk's sender the association is part of the time, and there are no latencies."""
    base = ["dcmsend", "-aec", "BENCH", "-pdu", "131072", "127.0.0.1", str(receiver.port)]
    environment = {**os.environ, "TCP_BUFFER_LENGTH": "1048576", "TCP_NODELAY": "1"}
    before, began = receiver.cpu(), time.monotonic()
    running = [
        subprocess.Popen([*base, *hand], env=environment, stderr=subprocess.DEVNULL)
        for hand in dealt(images, associations)
    ]
    bad = sum(process.wait(600) != 0 for process in running)
    seconds, size = time.monotonic() - began, sum(path.stat().st_size for path in images)
    cpu = 1e9 * (receiver.cpu() - before) / size
    return {"mb_s": size / 1e6 / seconds, "objects_s": len(images) / seconds, "cpu_ms_mb": cpu, "bad": bad}


def disk(folder: Path, images: list[Path], writers: int) -> dict:
    """The limit: the same bytes written, synced and renamed by as many processes, with no network at all."""
    folder.mkdir(parents=True)
    said = together([[sys.executable, "-c", DISK, str(folder), *hand] for hand in dealt(images, writers)])
    return figures(said, 0, 0) | {"cpu_ms_mb": None, "peak_mb": None, "associate_ms": None}


def cell(name: str, scratch: Path, images: list[Path], sender: str, associations: int) -> dict:
    """Run one receiver on an empty folder and clean up behind it."""
    folder = scratch / "one"
    try:
        if name == "disk":
            return disk(folder, images, associations)
        kind = next(kind for kind in KINDS if kind.name == name)
        with Receiver(kind, folder) as receiver:
            return {"raw": raw, "dcmsend": dcmsend}[sender](receiver, images, associations)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()  # the next one starts with an idle disk


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--quick", action="store_true", help="2 rounds of 8 objects, 1 and 4 associations")
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--objects", type=int, default=32)
    words.add_argument("--store", type=Path, help="a folder on the disk to measure; default: beside this repository")
    words.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "ingest.json")
    asked = words.parse_args()
    rounds, objects, loads = (2, 8, (1, 4)) if asked.quick else (asked.rounds, asked.objects, (1, 4, 8))
    store = asked.store or ROOT
    shared = "/dev/shm" if Path("/dev/shm").is_dir() else None
    plan = [("raw", n) for n in loads] + [("dcmsend", n) for n in loads[: 1 if asked.quick else 2]]
    cells: list[dict] = []
    echoed: list[dict] = []
    with (
        tempfile.TemporaryDirectory(prefix=".ingest-", dir=store) as scratch,
        tempfile.TemporaryDirectory(prefix="ingest-", dir=shared) as memory,
    ):
        sets = {"uncompressed": uncompressed(Path(memory), objects), "compressed": compressed(Path(memory), objects)}
        for turn in range(rounds):
            asked_first = [kind.name for kind in KINDS]
            random.Random(turn).shuffle(asked_first)
            echoed += [{"round": turn, **one} for one in echoes(Path(scratch), asked_first)]
            for label, images in sets.items():
                for sender, associations in plan:
                    names = [kind.name for kind in KINDS] + ["disk"] * (sender == "raw")
                    random.Random(turn).shuffle(names)
                    for name in names:
                        found = cell(name, Path(scratch), images, sender, associations)
                        where = {"round": turn, "set": label, "sender": sender, "associations": associations}
                        cells.append({**where, "receiver": name, **found})
                        print(
                            f"{turn} {label:12} {sender:7} x{associations} {name:22} {found['mb_s']:6.0f} MB/s",
                            flush=True,
                        )
                        if found["bad"]:
                            print(f"   {found['bad']} not stored", flush=True)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()[0]}
    durable = {kind.name: kind.durable for kind in KINDS} | {"disk": True}
    text, summary = table(cells, durable)
    echo_text, echo_summary = echo_table(echoed)
    print(f"\n{text}\n\n{echo_text}")
    asked.out.parent.mkdir(exist_ok=True)
    found = {"rounds": rounds, "objects": objects, "machine": machine, "summary": summary, "cells": cells}
    echo_found = {"summary": echo_summary, "cells": echoed}
    asked.out.write_text(json.dumps(found | {"echo": echo_found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
