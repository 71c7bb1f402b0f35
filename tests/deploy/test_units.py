"""The systemd units: systemd accepts them, they run real commands, and they are hardened."""

import shutil
import subprocess
from pathlib import Path

import pytest

from agent.service.supervisor import PARTS
from tests.support.deploy.model_server import ROOT

UNITS = ROOT / "deploy/systemd"
SERVICES = {part: UNITS / f"cxrloop-{part}.service" for part in ("listen", "infer", "learn")}
HARDENED = {
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectControlGroups": "yes",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "LockPersonality": "yes",
    "SystemCallArchitectures": "native",
    "SystemCallFilter": "@system-service",
    "UMask": "0077",
    "User": "cxrloop",
    "KillMode": "mixed",
    "Restart": "always",
}


def keys(unit: Path) -> dict[str, list[str]]:
    """Return every key of a unit with its values, in order."""
    values: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            values.setdefault(key, []).append(value)
    return values


@pytest.fixture
def machine(tmp_path):
    """Return a root folder as with cxrloop installed: systemd's units, the project's units, and the program."""
    installed = Path("/usr/lib/systemd/system")
    shutil.copytree(installed, tmp_path / "usr/lib/systemd/system", symlinks=True)
    (tmp_path / "lib").symlink_to("usr/lib")
    shutil.copytree(UNITS, tmp_path / "etc/systemd/system", dirs_exist_ok=True)
    program = tmp_path / "opt/cxrloop/bin/cxrloop"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return tmp_path


def verify(machine: Path) -> tuple[int, str]:
    """Verify the units in that root with systemd-analyze; return exit code and messages."""
    names = [unit.name for unit in sorted(UNITS.iterdir())]
    command = ["systemd-analyze", "verify", f"--root={machine}", "--man=no", *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.peer
def test_systemd_accepts_the_units(machine):
    assert verify(machine) == (0, "")


@pytest.mark.peer
def test_systemd_reports_a_wrong_key_and_a_missing_program(machine):
    with (machine / "etc/systemd/system/cxrloop-infer.service").open("a") as unit:
        unit.write("\n[Service]\nMemoryMaximum=1G\n")
    assert "Unknown key 'MemoryMaximum'" in verify(machine)[1]
    (machine / "opt/cxrloop/bin/cxrloop").unlink()
    assert "is not executable" in verify(machine)[1]


@pytest.mark.peer
@pytest.mark.parametrize("part", SERVICES)
def test_systemd_rates_the_exposure_of_each_unit_low(machine, part):
    command = ["systemd-analyze", "security", "--offline=true", f"--root={machine}", "--threshold=20"]
    done = subprocess.run([*command, SERVICES[part].name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-200:]  # exit 1 above 2.0 of 10


@pytest.mark.parametrize("part", SERVICES)
def test_each_unit_runs_one_part_hardened(part):
    unit = keys(SERVICES[part])
    assert unit["ExecStart"] == [
        f"/opt/cxrloop/bin/cxrloop serve --only {part} --config /var/lib/cxrloop/appliance.toml"
    ]
    for key, value in HARDENED.items():
        assert unit[key] == [value], key
    assert unit["MemoryMax"] and int(unit["TimeoutStopSec"][0]) >= 10


def test_every_part_of_serve_has_a_unit_and_the_target_wants_them_all():
    assert set(SERVICES) == set(PARTS)
    wanted = keys(UNITS / "cxrloop.target")["Wants"][0].split()
    assert sorted(wanted) == sorted(unit.name for unit in SERVICES.values())
    assert sorted(unit.name for unit in UNITS.iterdir()) == sorted([*wanted, "cxrloop.target"])


def test_server_and_agent_see_the_gpu_and_the_agent_alone_writes_the_site():
    listen, infer, learn = (keys(SERVICES[part]) for part in ("listen", "infer", "learn"))
    assert listen["PrivateDevices"] == ["yes"] and "DeviceAllow" not in listen
    for unit in (infer, learn):
        assert unit["DevicePolicy"] == ["closed"] and unit["DeviceAllow"] == ["char-nvidia* rw"]
    assert listen["ReadWritePaths"] == ["/var/lib/cxrloop/inbox /var/lib/cxrloop/node"]
    assert "ReadWritePaths" not in infer
    assert learn["ReadWritePaths"] == ["/var/lib/cxrloop"]


def test_the_model_server_reaches_this_machine_only():
    infer = keys(SERVICES["infer"])
    assert infer["IPAddressDeny"] == ["any"] and infer["IPAddressAllow"] == ["localhost"]
