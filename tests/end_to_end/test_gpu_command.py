"""`make gpu` on the CPU with small sizes: every part writes figures, and a part that cannot run is recorded."""

import json
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from bench.speed import gpu

ROOT = Path(__file__).resolve().parents[2]


def write_wheel(path):
    """Write a wheel with one empty module."""
    tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {
        "onlyhere.py": "",
        "onlyhere-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: onlyhere\nVersion: 1.0\n",
        "onlyhere-1.0.dist-info/WHEEL": tag,
    }
    files["onlyhere-1.0.dist-info/RECORD"] = "".join(f"{name},,\n" for name in files)
    with ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The result of all parts but the tests, which `make test` runs anyway."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    parts = ["machine", "speed", "memory", "serving"]
    command = [sys.executable, str(ROOT / "bench/speed/gpu.py"), "--device", "cpu", "--small", "--no-install"]
    ran = subprocess.run([*command, "--out", str(out), "--parts", *parts], cwd=ROOT, capture_output=True, text=True)
    return ran, json.loads(out.read_text())


def test_every_part_is_ok_and_has_its_figures(measured):
    ran, document = measured
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.startswith("missing: nothing; torch: ")
    parts = document["parts"]
    assert {name: part["state"] for name, part in parts.items()} == dict.fromkeys(
        ("machine", "speed", "memory", "serving"), "ok"
    )
    assert parts["speed"]["ratio"]["ours"]["images_per_s"] > 0
    assert parts["memory"]["notes"][0].startswith("out of memory: 24 images in a forward pass instead of 48")
    assert parts["memory"]["gradient_difference"] < 1e-3
    assert parts["serving"]["provider"] == "cpu" and max(parts["serving"]["largest_difference"].values()) < 1e-3
    assert set(parts["serving"]["latency"]) == {"1", "8", "16"}


def test_a_part_that_fails_or_takes_too_long_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"
    failing = tmp_path / "gpu_parts.py"
    failing.write_text(
        "import sys, time\n"
        "if sys.argv[1] == 'speed': sys.exit('no such kernel')\n"
        "if sys.argv[1] == 'memory': print('begun', flush=True); time.sleep(60)\n"
        "print('{\"figure\": 1}')\n"
    )
    monkeypatch.setattr(gpu, "PARTS_FILE", failing)
    monkeypatch.setattr(gpu, "LIMITS_S", gpu.LIMITS_S | {"memory": 10})
    parts = ["machine", "speed", "memory", "serving"]
    assert gpu.main(["--device", "cpu", "--no-install", "--out", str(out), "--parts", *parts]) == 1
    written = json.loads(out.read_text())["parts"]
    assert written["machine"]["figure"] == written["serving"]["figure"] == 1
    assert (written["speed"]["state"], written["speed"]["output"]) == ("failed with exit code 1", ["no such kernel"])
    assert (written["memory"]["state"], written["memory"]["output"]) == ("stopped at its limit of 10 s", ["begun"])


def test_what_is_missing_is_named_and_only_its_parts_do_not_run(tmp_path, monkeypatch, capsys):
    out = tmp_path / "gpu.json"
    seen = gpu.distributions(sys.executable)
    monkeypatch.setattr(gpu, "distributions", lambda python: {k: v for k, v in seen.items() if k != "onnxscript"})
    assert gpu.main(["--device", "cpu", "--no-install", "--out", str(out), "--parts", "machine", "serving"]) == 1
    written = json.loads(out.read_text())
    assert capsys.readouterr().out.startswith("missing: onnxscript; torch: ")
    assert written["missing"] == ["onnxscript"]
    assert written["parts"]["serving"] == {"state": "not run: missing onnxscript"}
    assert written["parts"]["machine"]["state"] == "ok"


def test_cuda_needs_the_runtime_for_cuda_and_the_cpu_takes_either():
    installed = dict.fromkeys((*gpu.LEARNER, *gpu.ONNX, "matplotlib", "pytest", "onnxruntime"), "1.0")
    assert gpu.missing_of(installed, "cuda") == ["onnxruntime-gpu"]
    assert gpu.missing_of(installed, "cpu") == []
    assert gpu.missing_of({}, "cuda")[:2] == ["torch", "torchvision"]


def test_without_a_gpu_the_command_says_so_in_one_line_and_runs_nothing(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    if gpu.torch_problem(sys.executable, "cuda") is None:  # a machine with a GPU: `make gpu` runs there
        return
    assert gpu.main(["--no-install", "--out", str(out)]) == 1
    assert "torch sees no GPU: check nvidia-smi and torch's build" in capsys.readouterr().out
    assert json.loads(out.read_text())["parts"] == {}


def test_wheels_are_installed_beside_the_machines_own_packages(tmp_path, monkeypatch):
    wheel = tmp_path / "wheels" / "onlyhere-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    write_wheel(wheel)
    monkeypatch.setattr(gpu, "ENVIRONMENT", tmp_path / "environment")
    python, problem = gpu.install(["onlyhere", "nowhere-at-all"], wheel.parent)
    seen = gpu.distributions(python)
    assert problem is None and seen["onlyhere"] == "1.0" and "nowhere-at-all" not in seen
    assert python == str(tmp_path / "environment" / "bin" / "python")
