"""The bytes of one association: read greedily, handed on without a copy, and never waited for without a limit.

Knows one socket, its buffer and the clock; what the bytes mean is the reader's business (dicom/node/pdu_reader.py).
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

BUFFER = 1 << 20  # bytes an association reads into; full, it is written out in one call
MOST_PARTS = 512  # fragments that are gathered for one write
PACE = 32 << 10  # bytes that a message must bring in each `stall` seconds: in 30, an eighth of a modem's speed
TICK = 1.0  # seconds of waiting for bytes between looks at clock and abort
REST = 0.05  # seconds between looks at what the rest of the association wants, while the peer says nothing

NO_REASON, UNRECOGNISED_PDU, UNEXPECTED, INVALID = 0, 1, 5, 6  # A-ABORT by the provider (PS3.8 table 9-26)

log = logging.getLogger("pynetdicom.dul")  # the library's own words at the library's own place; silenced in service


class Wire:
    """The reading side of an association's socket; a message slower than PACE in `stall` seconds is broken off."""

    def __init__(self, association: Association, stall: float):
        self._association, self._dul, self._stall = association, association.dul, stall
        self._buffer = memoryview(mmap.mmap(-1, BUFFER))  # takes memory only as far as it was ever filled
        self._start = self._end = 0  # of what was read and not yet taken
        self._parts: list[memoryview] = []  # of the buffer: poured and not yet written
        self._into: Callable[[list[memoryview]], None] | None = None
        self._received, self._mark, self._marked_at = 0, 0, time.monotonic()

    @property
    def pending(self) -> int:
        """Bytes that were read and not yet taken."""
        return self._end - self._start

    def begin(self) -> None:
        """A message may begin: its pace counts from here."""
        self._mark, self._marked_at = self._received, time.monotonic()

    def take(self, size: int) -> bytes:
        """The next `size` bytes, at most a quarter of BUFFER. Raises ConnectionEnded, AssociationEnded, ProtocolError."""
        while self.pending < size:
            self._more()
        self._start += size
        return bytes(self._buffer[self._start - size : self._start])

    def pour(self, size: int, into: Callable[[list[memoryview]], None]) -> None:
        """Hand the next `size` bytes to `into`, gathered, by the next `flush` at the latest. Raises as `take`."""
        self._into = into
        while size:
            if not self.pending:
                self._more()
            taken = min(size, self.pending)
            self._parts.append(self._buffer[self._start : self._start + taken])
            self._start += taken
            size -= taken
            if len(self._parts) >= MOST_PARTS:
                self.flush()

    def flush(self) -> None:
        """Write out what was poured."""
        parts, self._parts = self._parts, []
        if parts and self._into:
            self._into(parts)

    def drop(self) -> None:
        """Forget what was poured and not yet written."""
        self._parts = []

    def discard(self) -> None:
        """Forget what was read; where that is nothing, read and forget what there is. Raises ConnectionEnded."""
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
        """Give the buffer back: the library keeps associations that ended until its next collection."""
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
        """True when there is something to read, or to find out, within REST."""
        wire = self._dul.socket.socket if self._dul.socket else None
        if self.pending or wire is None or wire.fileno() < 0:
            return True
        if isinstance(wire, ssl.SSLSocket) and wire.pending():
            return True
        waiting = select.poll()
        waiting.register(wire, select.POLLIN)
        return bool(waiting.poll(REST * 1000))

    def _more(self) -> None:
        """Wait for bytes and read as many as there are."""
        if not self.pending and not self._parts:
            self._start = self._end = 0
        elif self._end == BUFFER:
            self.flush()
            left = self.pending
            self._buffer[:left] = self._buffer[self._start : self._end]
            self._start, self._end = 0, left
        wire = self._socket()
        while True:
            self._keep_pace()
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

    def _keep_pace(self) -> None:
        if self._association.is_aborted or self._dul._kill_thread or self._dul.artim_timer.expired:
            raise AssociationEnded
        now = time.monotonic()
        if now - self._marked_at > self._stall:
            if self._received - self._mark < PACE:
                raise ProtocolError(NO_REASON, f"less than {PACE >> 10} kB in {self._stall:g} s")
            self._mark, self._marked_at = self._received, now

    def _socket(self) -> socket.socket:
        """The socket, with the timeout that lets this thread look up now and then. Raises ConnectionEnded."""
        wire = self._dul.socket.socket if self._dul.socket else None
        if wire is None:
            raise ConnectionEnded
        if wire.gettimeout() != TICK:
            wire.settimeout(TICK)
        return wire
