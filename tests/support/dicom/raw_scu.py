"""An SCU on a plain socket, for tests that send what no library sends: any PDU, in any order, cut anywhere."""

import socket
import struct
import time

from dicom.node.dimse_command import IS_COMMAND, IS_LAST, p_data, pdv

A_ASSOCIATE_AC, A_ASSOCIATE_RJ, P_DATA, A_RELEASE_RQ, A_RELEASE_RP, A_ABORT = 2, 3, 4, 5, 6, 7
COMMAND, LAST = IS_COMMAND | IS_LAST, IS_LAST
VERIFICATION, IMPLICIT = "1.2.840.10008.1.1", "1.2.840.10008.1.2"


def item(kind: int, body: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(body)) + body


def associate_rq(kinds: list[tuple[str, str]], called: str = "CXRLOOP", calling: str = "SCU") -> bytes:
    """Return an A-ASSOCIATE-RQ that proposes each (SOP class, syntax) in its own context: 1, 3, 5..."""
    body = struct.pack(">HH16s16s32x", 1, 0, called.ljust(16).encode(), calling.ljust(16).encode())
    body += item(0x10, b"1.2.840.10008.3.1.1.1")
    for n, (sop_class, syntax) in enumerate(kinds):
        names = item(0x30, sop_class.encode()) + item(0x40, syntax.encode())
        body += item(0x20, struct.pack(">Bxxx", 2 * n + 1) + names)
    body += item(0x50, item(0x51, struct.pack(">L", 131072)) + item(0x52, b"1.2.3"))
    return struct.pack(">BxL", 1, len(body)) + body


def command(field: int, sop_class: str, sop_uid: str | None = None, has_data: bool = True, message: int = 1) -> bytes:
    def element(number: int, value: bytes) -> bytes:
        value += b"\0" * (len(value) % 2)
        return struct.pack("<HHL", 0, number, len(value)) + value

    body = element(0x0002, sop_class.encode()) + element(0x0100, struct.pack("<H", field))
    body += element(0x0110, struct.pack("<H", message)) + element(0x0700, b"\0\0")
    body += element(0x0800, struct.pack("<H", 1 if has_data else 0x0101))
    if sop_uid is not None:
        body += element(0x1000, sop_uid.encode())
    return element(0, struct.pack("<L", len(body))) + body


class Scu:
    """One connection to the node; `with Scu(port) as scu`."""

    def __init__(self, port: int):
        self.wire = socket.create_connection(("127.0.0.1", port), timeout=15)
        self.wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> "Scu":
        return self

    def __exit__(self, *raised: object) -> None:
        self.wire.close()

    def send(self, data: bytes) -> None:
        self.wire.sendall(data)

    def receive(self) -> tuple[int, bytes] | None:
        """Return the next PDU as (type, body); None when the node closed the connection."""
        try:
            kind, length = struct.unpack(">BxL", self._exactly(6))
            return kind, self._exactly(length)
        except (EOFError, ConnectionError):
            return None

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.wire.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def associate(self, kinds: list[tuple[str, str]], called: str = "CXRLOOP", calling: str = "SCU") -> int:
        """Return the PDU type of the answer, 0 when the node closed the connection; `self.answer` is its body."""
        self.send(associate_rq(kinds, called, calling))
        kind, self.answer = self.receive() or (0, b"")
        return kind

    def start_store(self, sop_class: str, sop_uid: str, context: int = 1) -> None:
        """Send the command of a C-STORE."""
        self.send(p_data(pdv(context, COMMAND, command(1, sop_class, sop_uid))))

    def send_data(self, data: bytes, last: bool = True, context: int = 1, step: int = 65536) -> None:
        """Send a data set, or its next piece, in PDUs of about `step` bytes."""
        pieces = [data[at : at + step] for at in range(0, len(data), step)] or [b""]
        for n, piece in enumerate(pieces):
            self.send(p_data(pdv(context, LAST if last and n == len(pieces) - 1 else 0, piece)))

    def status(self) -> int | None:
        """Return the status of the next response; None when the association ended."""
        heard = self.receive()
        if heard is None or heard[0] != P_DATA:
            self.answer = heard[1] if heard else b""
            return None
        at, message = 0, heard[1][6:]
        while at < len(message):
            number, length = struct.unpack_from("<2xHL", message, at)
            if number == 0x0900:
                return struct.unpack_from("<H", message, at + 8)[0]
            at += 8 + length
        return None

    def store(self, data: bytes, sop_class: str, sop_uid: str, context: int = 1) -> int | None:
        self.start_store(sop_class, sop_uid, context)
        self.send_data(data, context=context)
        return self.status()

    def echo(self, context: int = 1) -> int | None:
        self.send(p_data(pdv(context, COMMAND, command(0x30, VERIFICATION, has_data=False))))
        return self.status()

    def release(self) -> bool:
        self.send(struct.pack(">BxL4x", A_RELEASE_RQ, 4))
        heard = self.receive()
        return heard is not None and heard[0] == A_RELEASE_RP

    def abort(self) -> None:
        self.send(struct.pack(">BxL4x", A_ABORT, 4))

    def closed_within(self, seconds: float) -> bool:
        """Return whether the node closes the connection within `seconds`; ignores what it sends before."""
        until = time.monotonic() + seconds
        try:
            while (left := until - time.monotonic()) > 0:
                self.wire.settimeout(left)
                if not self.wire.recv(4096):
                    return True
        except ConnectionError:
            return True
        except TimeoutError:
            return False
        return False


def answers_echo(port: int) -> bool:
    """Return whether the node answers C-ECHO and A-RELEASE on a new association."""
    try:
        with Scu(port) as scu:
            return scu.associate([(VERIFICATION, IMPLICIT)]) == A_ASSOCIATE_AC and scu.echo() == 0 and scu.release()
    except ConnectionError:
        return False
