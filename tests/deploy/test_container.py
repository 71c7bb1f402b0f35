"""The container's files and its health check, without a container engine."""

import re
import socket
import subprocess
import sys

import pytest

from tests.support.deploy.model_server import ROOT, Site, serving

DOCKER = ROOT / "deploy/docker"


def health(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "deploy.server.health", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)


def test_the_health_check_passes_when_the_server_answers_without_a_model(tmp_path):
    with serving(Site(tmp_path / "s")) as (_, client):
        url = client.url
        assert health("--http", f"{url}/healthz", "--tcp", url.removeprefix("http://")).returncode == 0
        assert health("--http", f"{url}/readyz").stderr == "unhealthy: HTTP Error 503: Service Unavailable\n"


def test_the_health_check_prints_the_reason_of_a_failure():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    done = health("--tcp", f"127.0.0.1:{port}")
    assert done.returncode == 1 and "Connection refused" in done.stderr


@pytest.mark.parametrize("package", ["agent", "dicom", "learner", "deploy", "cxrloop"])
def test_the_container_holds_every_package_and_runs_without_root(package):
    text = (DOCKER / "Dockerfile").read_text()
    assert f"\nCOPY {package} {package}\n" in text
    assert f"!{package}" in (DOCKER / "Dockerfile.dockerignore").read_text().split()
    assert re.findall(r"^USER (.*)$", text, re.M) == ["10001:10001"]
    assert text.count("\nFROM ") == 2 and "HEALTHCHECK" in text


def test_the_gpu_is_reserved_in_one_compose_file_and_not_in_the_other():
    gpu, cpu, base = (DOCKER / name for name in ("compose.yaml", "compose.cpu.yaml", "base.yaml"))
    assert "driver: nvidia" in gpu.read_text() and "RUNTIME: gpu" in gpu.read_text()
    assert "nvidia" not in cpu.read_text() + base.read_text() and "RUNTIME: cpu" in cpu.read_text()
    for line in ("read_only: true", "no-new-privileges:true", 'user: "10001:10001"', "- site:/site"):
        assert line in base.read_text()
