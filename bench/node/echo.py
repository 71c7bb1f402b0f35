"""Time of a C-ECHO beside idle connections: one table of bench/node/ingest.py.

A raw-socket peer repeats connection, association, echo and release, beside 0 and beside 30 idle sockets.
"""

from __future__ import annotations

import shutil
import socket
import struct
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from bench.node.receivers import KINDS, Receiver
from bench.node.sender import associate, pdu
from dicom.node.dimse_command import IS_COMMAND, IS_LAST, p_data, pdv

VERIFICATION, IMPLICIT_LE = "1.2.840.10008.1.1", "1.2.840.10008.1.2"
IDLE = (0, 30)  # sockets
TIMES = 9
TIMEOUT_S = 10  # for one echo; a receiver that exceeds it gets no further echo
BAR_MS = 100  # for the slowest echo of this node


def echo_request() -> bytes:
    """Return a C-ECHO-RQ with message id 1 (PS3.7 table 9.3-12)."""

    def element(number: int, value: bytes) -> bytes:
        return struct.pack("<HHL", 0, number, len(value)) + value

    uid = VERIFICATION.encode() + b"\0"
    body = element(0x0002, uid) + element(0x0100, b"\x30\0") + element(0x0110, b"\1\0") + element(0x0800, b"\1\1")
    return element(0, struct.pack("<L", len(body))) + body


def echo(port: int) -> float | None:
    """Return the seconds from connecting to the confirmed release, or None without an answer within TIMEOUT_S."""
    began = time.perf_counter()
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as wire:
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            associate(wire, "BENCH", [(VERIFICATION, IMPLICIT_LE)])
            wire.sendall(p_data(pdv(1, IS_COMMAND | IS_LAST, echo_request())))
            kind, _ = pdu(wire)
            wire.sendall(struct.pack(">BxL4x", 5, 4))
            released, _ = pdu(wire)
    except (OSError, SystemExit):
        return None
    return time.perf_counter() - began if (kind, released) == (4, 6) else None


def echoes_beside_idle(port: int, idle: int) -> dict:
    """Return the times in ms of TIMES echoes beside `idle` idle sockets; `unanswered` if an echo timed out."""
    with ExitStack() as held:
        for _ in range(idle):
            held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S))
        ms: list[float] = []
        while len(ms) < TIMES and (seconds := echo(port)) is not None:
            ms.append(1e3 * seconds)
    return {"idle": idle, "ms": ms, "unanswered": len(ms) < TIMES}


def echoes(folder: Path, names: list[str]) -> list[dict]:
    """Return one round: every receiver that offers Verification, in this order, each on an empty folder."""
    cells = []
    for name in names:
        if name == "naive pynetdicom":
            continue
        kind = next(kind for kind in KINDS if kind.name == name)
        for idle in IDLE:
            with Receiver(kind, folder / "echo") as receiver:
                cells.append({"receiver": name, **echoes_beside_idle(receiver.port, idle)})
            shutil.rmtree(folder / "echo", ignore_errors=True)
    return cells


def echo_table(cells: list[dict]) -> tuple[str, list[dict]]:
    """Return (text, summary rows): median and slowest echo over all rounds, and the bar."""
    lines, summary = [f"C-ECHO beside idle sockets, {TIMES} a round", f"{'':26}idle  median ms    most ms"], []
    for name in dict.fromkeys(cell["receiver"] for cell in cells):
        for idle in IDLE:
            rows = [cell for cell in cells if (cell["receiver"], cell["idle"]) == (name, idle)]
            ms = sorted(value for cell in rows for value in cell["ms"])
            late = any(cell["unanswered"] for cell in rows)
            row = {"receiver": name, "idle": idle, "median_ms": median(ms) if ms else None, "unanswered": late}
            row["most_ms"] = None if late else ms[-1]
            summary.append(row)
            middle, most = (f"{row[key]:.1f}" if row[key] is not None else "-" for key in ("median_ms", "most_ms"))
            end = f"  no answer in {TIMEOUT_S} s" if late else ""
            lines.append(f"{name:26}{idle:4}{middle:>11}{most:>11}{end}")
    ours = next((row for row in summary if (row["receiver"], row["idle"]) == ("ours", IDLE[-1])), None)
    if ours:
        outcome = "MISSED" if ours["unanswered"] or ours["most_ms"] >= BAR_MS else "met"
        lines.append(f"bar: C-ECHO < {BAR_MS} ms beside {IDLE[-1]} idle sockets: {outcome}")
    return "\n".join(lines), summary
