"""The machine that a benchmark ran on: cores, load, versions; and the CPU seconds of this process and its children."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any


def facts(*packages: str, **more: Any) -> dict[str, Any]:
    """Return what a result file records of the machine, with the versions of `packages` and the values of `more`.

    `load` is the load average of the last minute, the machine's other work included.
    """
    machine = {
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }
    return machine | {package: version(package) for package in packages} | more


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its ended children."""
    return sum(os.times()[:4])


def children_cpu_seconds() -> float:
    """Return the CPU seconds of all ended child processes."""
    times = os.times()
    return times.children_user + times.children_system
