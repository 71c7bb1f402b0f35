"""Send files over one association as fast as the receiver accepts them, and time each object: raw sockets, no library.

A process of its own, started by ingest.py: prints "ready" once associated, waits for a line, sends, prints JSON.
PDUs have the longest length that the receiver accepts, at most 131072 bytes. The latency of an object lasts from its
first byte sent to its C-STORE-RSP received.

    python bench/node/sender.py HOST PORT AET FILE...
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.common import results
from dicom.dataset.part10 import open_envelope
from dicom.node.dimse_command import IS_COMMAND, IS_LAST, p_data, parse, pdv

LARGEST_PDU = 131072
CONTEXT_NAME = "1.2.840.10008.3.1.1.1"
DATA = 0  # control header of a fragment of a data set


class ImageFile:
    """One file: its UIDs, its syntax and the bytes after the file meta."""

    def __init__(self, path: Path):
        whole = path.read_bytes()
        with path.open("rb") as stream:
            envelope = open_envelope(stream)
        self.syntax, self.data = envelope.transfer_syntax, memoryview(whole)[envelope.offset :]
        self.sop_class, self.sop_uid = _meta(whole, 2), _meta(whole, 3)


def _meta(whole: bytes, element: int) -> str:
    at = 132
    while True:
        number, vr, length = struct.unpack_from("<2xH2sH", whole, at)
        start = at + 8
        if vr == b"OB":
            length, start = struct.unpack_from("<L", whole, at + 8)[0], at + 12
        if number == element:
            return whole[start : start + length].decode().strip("\0")
        at = start + length


def receive(wire: socket.socket, size: int) -> bytes:
    """Return exactly `size` bytes."""
    data = b""
    while len(data) < size:
        more = wire.recv(size - len(data))
        if not more:
            raise ConnectionError("the receiver closed the connection")
        data += more
    return data


def pdu(wire: socket.socket) -> tuple[int, bytes]:
    """Receive one PDU; return (type, body)."""
    kind, length = struct.unpack(">BxL", receive(wire, 6))
    return kind, receive(wire, length)


def associate(wire: socket.socket, called: str, kinds: list[tuple[str, str]], calling: str = "BENCH") -> int:
    """Propose one context for each (SOP class, syntax), 1, 3, ...; return the largest PDU length. Raises SystemExit."""

    def item(kind: int, body: bytes) -> bytes:
        return struct.pack(">BxH", kind, len(body)) + body

    body = struct.pack(">HH16s16s32x", 1, 0, called.ljust(16).encode(), calling.ljust(16).encode())
    body += item(0x10, CONTEXT_NAME.encode())
    for n, (sop_class, syntax) in enumerate(kinds):
        names = item(0x30, sop_class.encode()) + item(0x40, syntax.encode())
        body += item(0x20, struct.pack(">Bxxx", 2 * n + 1) + names)
    user = item(0x51, struct.pack(">L", LARGEST_PDU)) + item(0x52, b"1.2.826.0.1.3680043.8.498.1")
    body += item(0x50, user)
    wire.sendall(struct.pack(">BxL", 1, len(body)) + body)
    kind, answer = pdu(wire)
    if kind != 2:
        raise SystemExit(f"association refused: PDU type {kind}, {answer[:4].hex()}")
    largest, at = LARGEST_PDU, 68
    while at < len(answer):
        kind, length = struct.unpack_from(">BxH", answer, at)
        if kind == 0x21 and answer[at + 6]:
            raise SystemExit(f"context {answer[at + 4]} refused with {answer[at + 6]}")
        if kind == 0x50 and answer[at + 4] == 0x51:
            largest = struct.unpack_from(">L", answer, at + 8)[0] or LARGEST_PDU
        at += 4 + length
    return min(largest, LARGEST_PDU)


def store_request(sop_class: str, sop_uid: str, message: int) -> bytes:
    """Return a C-STORE-RQ (PS3.7 table 9.3-1)."""

    def element(number: int, value: bytes) -> bytes:
        value += b"\0" * (len(value) % 2)
        return struct.pack("<HHL", 0, number, len(value)) + value

    body = element(0x0002, sop_class.encode()) + element(0x0100, b"\1\0") + element(0x0110, struct.pack("<H", message))
    body += element(0x0700, b"\0\0") + element(0x0800, b"\1\0") + element(0x1000, sop_uid.encode())
    return element(0, struct.pack("<L", len(body))) + body


def encoded(image: ImageFile, context: int, message: int, largest: int) -> list[bytes | memoryview]:
    """Return the whole C-STORE as PDUs: headers, and views of the file between them."""
    command = store_request(image.sop_class, image.sop_uid, message)
    out: list[bytes | memoryview] = [p_data(pdv(context, IS_COMMAND | IS_LAST, command))]
    step = largest - 6
    for at in range(0, len(image.data), step):
        piece = image.data[at : at + step]
        control = IS_LAST if at + step >= len(image.data) else DATA
        out += [struct.pack(">BxLLBB", 4, len(piece) + 6, len(piece) + 2, context, control), piece]
    return out


def store(wire: socket.socket, parts: list[bytes | memoryview]) -> int:
    """Send one encoded object; return its status."""
    parts = list(parts)
    while parts:
        sent = wire.sendmsg(parts[:64])
        while parts and sent >= len(parts[0]):
            sent -= len(parts.pop(0))
        if sent:
            parts[0] = memoryview(parts[0])[sent:]
    _, answer = pdu(wire)
    command = answer[6:]
    parse(command)
    at = 0
    while at < len(command):
        element, length = struct.unpack_from("<2xHL", command, at)
        if element == 0x0900:
            return struct.unpack_from("<H", command, at + 8)[0]
        at += 8 + length
    raise ConnectionError("a C-STORE-RSP without a status")


def main() -> None:
    """Associate, wait for a line on stdin, send, print the times as JSON."""
    parser = results.parser(__doc__)
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("aet", help="called AE title")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    options = parser.parse_args()
    images = [ImageFile(path) for path in options.files]
    kinds = sorted({(image.sop_class, image.syntax) for image in images})
    began = time.monotonic()
    wire = socket.create_connection((options.host, options.port), timeout=120)
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    largest = associate(wire, options.aet, kinds)
    associated = time.monotonic() - began
    objects = [
        encoded(image, 2 * kinds.index((image.sop_class, image.syntax)) + 1, n + 1, largest)
        for n, image in enumerate(images)
    ]
    print("ready", flush=True)
    sys.stdin.readline()
    started, latencies, statuses = time.monotonic(), [], []
    for parts in objects:
        first = time.monotonic()
        statuses.append(store(wire, parts))
        latencies.append(time.monotonic() - first)
    ended = time.monotonic()
    wire.sendall(struct.pack(">BxL4x", 5, 4))
    pdu(wire)
    print(
        json.dumps(
            {
                "associate": associated,
                "started": started,
                "ended": ended,
                "latencies": latencies,
                "bytes": sum(len(image.data) for image in images),
                "bad": sum(status != 0 for status in statuses),
            }
        )
    )


if __name__ == "__main__":
    main()
