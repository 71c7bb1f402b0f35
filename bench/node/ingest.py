"""Throughput of durable C-STORE: this node, Orthanc, storescp, a plain pynetdicom handler and the disk, in one run.

Every round runs every receiver once, in changing order, so that other load on the machine meets all of them. Figures
are medians over rounds; ratios are of pairs within a round. Durable means fsync before Success; the table marks the two
receivers that are not. Images: RG1 and RG3 of pydicom-data with new UIDs, read from memory; the receivers write to disk.

    python bench/node/ingest.py [--quick] [--rounds 5] [--objects 32] [--store FOLDER] [--out bench/results/ingest.json]
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.common import machine, results
from bench.common.appliance import ROOT, dcmtk, python_path
from bench.node.echo import echo_table, echoes
from bench.node.images import compressed, uncompressed
from bench.node.receivers import KINDS, Receiver
from bench.node.table import table

# the disk alone: the same writes as the node's, without a network
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


def run_together(commands: list[list[str]]) -> list[dict]:
    """Start the senders, release them together when all are ready, and return the JSON that each prints."""
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=python_path())
        for command in commands
    ]
    for process in running:
        if process.stdout.readline() != "ready\n":  # type: ignore[union-attr]
            raise SystemExit(f"a sender is not ready: {process.args}")
    for process in running:
        process.stdin.write("go\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    return [json.loads(process.communicate(timeout=600)[0]) for process in running]


def deal(images: list[Path], senders: int) -> list[list[str]]:
    """Return the paths of the images, dealt to the senders in turn; no sender is left without an image."""
    return [[str(path) for path in images[n::senders]] for n in range(min(senders, len(images)))]


def figures(senders: list[dict], cpu: float, peak: int) -> dict:
    """Return one cell of the table from the results of its senders."""
    seconds = max(sender["ended"] for sender in senders) - min(sender["started"] for sender in senders)
    size = sum(sender["bytes"] for sender in senders)
    latencies = sorted(latency for sender in senders for latency in sender["latencies"])
    return {
        "mb_s": size / 1e6 / seconds,
        "objects_s": len(latencies) / seconds,
        "p50_ms": 1e3 * median(latencies),
        "p99_ms": 1e3 * latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))],
        "cpu_ms_mb": 1e3 * cpu / (size / 1e6),
        "peak_mb": peak / 1e6,
        "associate_ms": 1e3 * median(sender["associate"] for sender in senders),
        "bad": sum(sender["bad"] for sender in senders),
    }


def raw(receiver: Receiver, images: list[Path], associations: int) -> dict:
    """Return the figures of a receiver under raw-socket senders (bench/node/sender.py)."""
    command = [sys.executable, str(ROOT / "bench" / "node" / "sender.py"), "127.0.0.1", str(receiver.port), "BENCH"]
    before = receiver.cpu()
    senders = run_together([[*command, *share] for share in deal(images, associations)])
    return figures(senders, receiver.cpu() - before, receiver.peak)


def dcmsend(receiver: Receiver, images: list[Path], associations: int) -> dict:
    """Return the figures under dcmtk's dcmsend: times include the association, and there are no latencies."""
    base = [dcmtk("dcmsend"), "-aec", "BENCH", "-pdu", "131072", "127.0.0.1", str(receiver.port)]
    environment = {**os.environ, "TCP_BUFFER_LENGTH": "1048576", "TCP_NODELAY": "1"}
    before, began = receiver.cpu(), time.monotonic()
    running = [
        subprocess.Popen([*base, *share], env=environment, stderr=subprocess.DEVNULL)
        for share in deal(images, associations)
    ]
    bad = sum(process.wait(600) != 0 for process in running)
    seconds, size = time.monotonic() - began, sum(path.stat().st_size for path in images)
    cpu = 1e9 * (receiver.cpu() - before) / size
    return {"mb_s": size / 1e6 / seconds, "objects_s": len(images) / seconds, "cpu_ms_mb": cpu, "bad": bad}


def disk(folder: Path, images: list[Path], writers: int) -> dict:
    """Return the figures of the limit: as many processes write, sync and rename the same bytes, without a network."""
    folder.mkdir(parents=True)
    written = run_together([[sys.executable, "-c", DISK, str(folder), *share] for share in deal(images, writers)])
    return figures(written, 0, 0) | {"cpu_ms_mb": None, "peak_mb": None, "associate_ms": None}


def cell(name: str, scratch: Path, images: list[Path], sender: str, associations: int) -> dict:
    """Run one receiver on an empty folder; return its figures."""
    folder = scratch / "one"
    try:
        if name == "disk":
            return disk(folder, images, associations)
        kind = next(kind for kind in KINDS if kind.name == name)
        with Receiver(kind, folder) as receiver:
            return {"raw": raw, "dcmsend": dcmsend}[sender](receiver, images, associations)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()  # the next receiver starts with an idle disk


def main() -> None:
    """Measure every receiver in every round, print and write."""
    parser = results.parser(__doc__, "ingest.json")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 8 objects, 1 and 4 associations")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--objects", type=int, default=32)
    parser.add_argument("--store", type=Path, help="a folder on the disk to measure; default: beside this repository")
    options = parser.parse_args()
    rounds, objects, loads = (2, 8, (1, 4)) if options.quick else (options.rounds, options.objects, (1, 4, 8))
    store = options.store or ROOT
    shared = "/dev/shm" if Path("/dev/shm").is_dir() else None
    plan = [("raw", n) for n in loads] + [("dcmsend", n) for n in loads[: 1 if options.quick else 2]]
    cells: list[dict] = []
    echoed: list[dict] = []
    with (
        tempfile.TemporaryDirectory(prefix=".ingest-", dir=store) as scratch,
        tempfile.TemporaryDirectory(prefix="ingest-", dir=shared) as memory,
    ):
        sets = {"uncompressed": uncompressed(Path(memory), objects), "compressed": compressed(Path(memory), objects)}
        for turn in range(rounds):
            order = [kind.name for kind in KINDS]
            random.Random(turn).shuffle(order)
            echoed += [{"round": turn, **row} for row in echoes(Path(scratch), order)]
            for label, images in sets.items():
                for sender, associations in plan:
                    names = [kind.name for kind in KINDS] + ["disk"] * (sender == "raw")
                    random.Random(turn).shuffle(names)
                    for name in names:
                        measured = cell(name, Path(scratch), images, sender, associations)
                        where = {"round": turn, "set": label, "sender": sender, "associations": associations}
                        cells.append({**where, "receiver": name, **measured})
                        print(
                            f"{turn} {label:12} {sender:7} x{associations} {name:22} {measured['mb_s']:6.0f} MB/s",
                            flush=True,
                        )
                        if measured["bad"]:
                            print(f"   {measured['bad']} not stored", flush=True)
    durable = {kind.name: kind.durable for kind in KINDS} | {"disk": True}
    text, summary = table(cells, durable)
    echo_text, echo_summary = echo_table(echoed)
    print(f"\n{text}\n\n{echo_text}")
    document = {"rounds": rounds, "objects": objects, "machine": machine.facts(), "summary": summary, "cells": cells}
    results.write(options.out, document | {"echo": {"summary": echo_summary, "cells": echoed}})


if __name__ == "__main__":
    main()
