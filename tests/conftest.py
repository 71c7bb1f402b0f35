"""What every test may use: a site folder, and the rule for tests that talk to programs pip does not bring."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from agent.site import config
from agent.site.site import Site, init
from tests.support import small_disk
from tests.support.ports import free_ports

PEERS = {
    "dcmtk": ("dcmsend", "storescu", "echoscu"),
    "orthanc": ("Orthanc",),
    "orthanc-dicomweb": ("/usr/share/orthanc/plugins/libOrthancDicomWeb.so",),
    "dicom3tools": ("dciodvfy",),
    "systemd": ("systemd-analyze",),
    "sqlite3": ("sqlite3",),
    "openssl": ("openssl",),
}
MOUNT = "mount"  # no program: the kernel's leave to mount a small file system
HINT = "make peers"
not_run: list[str] = []


def missing_peers(wanted: tuple[str, ...]) -> list[str]:
    """Which of these Debian packages, or MOUNT, are not here (of all packages when none is named)."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return [
        n for n in wanted or tuple(PEERS)
        if not (small_disk.way() if n == MOUNT else all(shutil.which(program, os.F_OK, path) for program in PEERS[n]))
    ]  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With CI=true a missing program fails its tests; elsewhere they are left out, and the end of the run says so.

    Where the kernel grants no mount, no program helps: those tests are left out everywhere.
    """
    strict = os.environ.get("CI") == "true"
    kept, out = [], []
    for item in items:
        mark = item.get_closest_marker("peer")
        missing = missing_peers(mark.args) if mark else []
        (out if missing and (missing == [MOUNT] or not strict) else kept).append(item)
    not_run.extend(item.nodeid for item in out)
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    mark = item.get_closest_marker("peer")
    if mark and (missing := missing_peers(mark.args)):
        pytest.fail(f"needs {', '.join(missing)}; bring them with `{HINT}`")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands on what it left out."""
    if (said := getattr(session.config, "workeroutput", None)) is not None:
        said["not_run"] = not_run


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    not_run[:] = getattr(node, "workeroutput", {}).get("not_run", not_run)  # each worker leaves out the same


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not_run:
        missing = missing_peers(tuple(PEERS))
        why = [f"{', '.join(missing)} not here (`{HINT}` brings them)"] if missing else []
        why += ["this kernel grants no mount"] if missing_peers((MOUNT,)) else []
        terminalreporter.write_line(f"{len(not_run)} peer tests did not run: {'; '.join(why)}")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A fresh demo-sized site with three findings and no window."""
    return make_site(tmp_path / "site")


def make_site(folder: Path, **sections: dict) -> Site:
    """A site whose settings differ from the demo's by `sections`."""
    port, infer_port = free_ports(2)
    values: dict = {
        "site": {"findings": ["cardiomegaly", "effusion", "opacity"]},
        "node": {"port": port, "min_free_mb": 1},
        "admission": {"quality": False},  # most tests' images are patterns, no chests
        "infer": {"port": infer_port, "provider": "cpu", "threads": 1},
        "patients": {"golden": 0.4, "golden_next": 0.0, "calibration": 0.1, "validation": 0.1},
        "learn": {"profile": "demo", "window": ""},
    }
    for name, keys in sections.items():
        values[name] = values.get(name, {}) | keys
    return init(folder, config.checked(values))
