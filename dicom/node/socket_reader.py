"""Reads the bytes of one association from its socket: as many as possible at once, without a copy, with a minimum pace.

Works on one socket and its buffer; dicom/node/pdu_reader.py interprets the bytes.
"""

import logging
import mmap
import select
import socket
import ssl
import time
from collections.abc import Callable

from pynetdicom.association import Association

from dicom.errors import AssociationEnded, ConnectionEnded, ProtocolError

BUFFER = 1 << 20  # bytes of an association's buffer; a full buffer is written in one call
MAX_PARTS = 512  # fragments collected for one write
PACE = 32 << 10  # bytes that a message must bring in each `stall` seconds: in 30, an eighth of a modem's speed
TICK = 1.0  # seconds of waiting for bytes between checks of clock and abort
POLL_S = 0.05  # seconds between checks for work of the association while the peer sends nothing

NO_REASON, UNRECOGNISED_PDU, UNEXPECTED, INVALID = 0, 1, 5, 6  # A-ABORT by the provider (PS3.8 table 9-26)

log = logging.getLogger("pynetdicom.dul")  # for the library's own messages; silenced in service


class SocketReader:
    """The reading side of an association's socket; a message slower than PACE bytes in `stall` seconds is an error."""

    def __init__(self, association: Association, stall: float):
        self._association, self._dul, self._stall = association, association.dul, stall
        self._buffer = memoryview(mmap.mmap(-1, BUFFER))  # uses memory only as far as it was ever filled
        self._start = self._end = 0  # of the bytes in the buffer that are not yet read
        self._parts: list[memoryview] = []  # of the buffer: forwarded and not yet written
        self._write: Callable[[list[memoryview]], None] | None = None
        self._received, self._mark, self._marked_at = 0, 0, time.monotonic()

    @property
    def pending(self) -> int:
        """Number of bytes that were received and not yet read."""
        return self._end - self._start

    def start_message(self) -> None:
        """Measure the pace from here, because a new message may begin."""
        self._mark, self._marked_at = self._received, time.monotonic()

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, at most a quarter of BUFFER.

        Raises ConnectionEnded, AssociationEnded, ProtocolError.
        """
        while self.pending < size:
            self._receive()
        self._start += size
        return bytes(self._buffer[self._start - size : self._start])

    def forward(self, size: int, write: Callable[[list[memoryview]], None]) -> None:
        """Pass the next `size` bytes to `write`, at the latest with the next `flush`. Raises as `read`."""
        self._write = write
        while size:
            if not self.pending:
                self._receive()
            length = min(size, self.pending)
            self._parts.append(self._buffer[self._start : self._start + length])
            self._start += length
            size -= length
            if len(self._parts) >= MAX_PARTS:
                self.flush()

    def flush(self) -> None:
        """Write all forwarded bytes."""
        parts, self._parts = self._parts, []
        if parts and self._write:
            self._write(parts)

    def drop(self) -> None:
        """Drop forwarded bytes that are not yet written."""
        self._parts = []

    def discard(self) -> None:
        """Discard all bytes in the buffer; if there are none, receive and discard some. Raises ConnectionEnded."""
        if self.pending:
            self._start = self._end = 0
            return
        try:
            if not self._socket().recv_into(self._buffer):
                raise ConnectionEnded
        except TimeoutError:
            return
        except OSError as error:
            raise ConnectionEnded from error

    def close(self) -> None:
        """Free the buffer now: the library keeps ended associations until its next garbage collection."""
        self.drop()
        self._start = self._end = 0
        self._buffer = memoryview(bytearray(1))

    def send(self, data: bytes) -> None:
        """Send all of `data`. Raises ConnectionEnded."""
        try:
            self._socket().sendall(data)
        except OSError as error:
            raise ConnectionEnded from error
        self._dul._idle_timer.restart()

    def readable(self) -> bool:
        """Return whether a read would not block, also because the connection ended; waits at most POLL_S."""
        wire = self._dul.socket.socket if self._dul.socket else None
        if self.pending or wire is None or wire.fileno() < 0:
            return True
        return has_bytes(wire, POLL_S)

    def _receive(self) -> None:
        """Wait for bytes and receive as many as there are."""
        if not self.pending and not self._parts:
            self._start = self._end = 0
        elif self._end == BUFFER:
            self.flush()
            left = self.pending
            self._buffer[:left] = self._buffer[self._start : self._end]
            self._start, self._end = 0, left
        wire = self._socket()
        while True:
            self._check_pace()
            try:
                size = wire.recv_into(self._buffer[self._end :])
                break
            except TimeoutError:
                continue
            except OSError as error:
                log.error("Connection closed before the entire PDU was received")
                raise ConnectionEnded from error
        if not size:
            raise ConnectionEnded
        self._end += size
        self._received += size
        self._dul._idle_timer.restart()

    def _check_pace(self) -> None:
        if self._association.is_aborted or self._dul._kill_thread or self._dul.artim_timer.expired:
            raise AssociationEnded
        now = time.monotonic()
        if now - self._marked_at > self._stall:
            if self._received - self._mark < PACE:
                raise ProtocolError(NO_REASON, f"less than {PACE >> 10} kB in {self._stall:g} s")
            self._mark, self._marked_at = self._received, now

    def _socket(self) -> socket.socket:
        """Return the socket, with a timeout of TICK to check clock and abort. Raises ConnectionEnded."""
        wire = self._dul.socket.socket if self._dul.socket else None
        if wire is None:
            raise ConnectionEnded
        if wire.gettimeout() != TICK:
            wire.settimeout(TICK)
        return wire


def has_bytes(wire: socket.socket, seconds: float) -> bool:
    """Return True as soon as the socket has bytes to read or was closed, False if not within `seconds`."""
    if isinstance(wire, ssl.SSLSocket) and wire.pending():
        return True
    poll = select.poll()
    poll.register(wire, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
