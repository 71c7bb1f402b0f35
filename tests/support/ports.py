"""Free TCP ports on loopback."""

import socket


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def free_ports(n: int) -> tuple[int, ...]:
    """Return `n` consecutive ports that are free now, the lowest first."""
    while True:
        first = free_port()
        probes = [socket.socket() for _ in range(n)]
        try:
            for offset, probe in enumerate(probes):
                probe.bind(("127.0.0.1", first + offset))
        except (OSError, OverflowError):  # one of them is in use, or above 65535
            continue
        finally:
            for probe in probes:
                probe.close()
        return tuple(range(first, first + n))
