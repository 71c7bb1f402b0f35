"""Fixtures of all tests, the rule for tests that need programs outside pip, and the order in which files run."""

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
MOUNT = "mount"  # no program: the kernel must allow mounting a small file system
HINT = "make peers"
not_run: list[str] = []
# Files with the longest tests start first, so that no worker ends with one of them while the others are idle.
SLOW_FIRST = (
    "agent/rounds/test_inspection", "agent/results/test_explain", "learner/training/test_torchrun",
    "learner/engine/test_device", "end_to_end/test_site_0_1_0", "end_to_end/test_straight_line",
    "learner/training/test_round", "learner/recipes/test_evolve", "learner/recipes/test_kd",
    "agent/service/test_scheduler", "agent/rounds/test_training_launcher", "learner/recipes/test_pseudo_label",
    "end_to_end/test_crash", "agent/results/test_returned", "agent/erasure/test_forget", "agent/network/",
)  # fmt: skip


def missing_peers(wanted: tuple[str, ...]) -> list[str]:
    """Return which of these Debian packages, or MOUNT, are missing (of all packages when none is named)."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return [
        peer for peer in wanted or tuple(PEERS)
        if not (small_disk.way() if peer == MOUNT else all(shutil.which(name, os.F_OK, path) for name in PEERS[peer]))
    ]  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put slow files first; leave out tests whose program is missing, which the end of the run reports.

    With CI=true a missing program fails its tests instead. Where the kernel allows no mount, installing helps nothing:
    those tests are left out everywhere.
    """
    strict = os.environ.get("CI") == "true"
    kept, left_out = [], []
    for item in items:
        mark = item.get_closest_marker("peer")
        missing = missing_peers(mark.args) if mark else []
        (left_out if missing and (missing == [MOUNT] or not strict) else kept).append(item)
    not_run.extend(item.nodeid for item in left_out)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    items[:] = sorted(kept, key=place_in_run)


def place_in_run(item: pytest.Item) -> int:
    """Return the place of a test's file in SLOW_FIRST, or the end; sorting is stable, so files stay whole."""
    return next((n for n, name in enumerate(SLOW_FIRST) if f"tests/{name}" in item.nodeid), len(SLOW_FIRST))


def pytest_runtest_setup(item: pytest.Item) -> None:
    mark = item.get_closest_marker("peer")
    if mark and (missing := missing_peers(mark.args)):
        pytest.fail(f"needs {', '.join(missing)}; bring them with `{HINT}`")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the list of tests that did not run from a worker of pytest-xdist to the main process."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["not_run"] = not_run


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    not_run[:] = getattr(node, "workeroutput", {}).get("not_run", not_run)  # every worker leaves out the same tests


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not_run:
        missing = missing_peers(tuple(PEERS))
        why = [f"{', '.join(missing)} not here (`{HINT}` brings them)"] if missing else []
        why += ["this kernel grants no mount"] if missing_peers((MOUNT,)) else []
        terminalreporter.write_line(f"{len(not_run)} peer tests did not run: {'; '.join(why)}")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Return a new site of profile demo with three findings and no nightly window."""
    return make_site(tmp_path / "site")


def make_site(folder: Path, **sections: dict) -> Site:
    """Return a new site; `sections` replace keys of the settings below."""
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
