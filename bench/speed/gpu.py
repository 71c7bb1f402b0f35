"""Everything that needs a GPU, in one command within eight minutes: `make gpu`.

    python bench/speed/gpu.py [--wheels DIR] [--device cpu --small] [--parts tests speed ...]

Starts on a machine that has Python and torch only (standard library until the parts run). First it says in one line what
is missing, and installs that into build/gpu (a virtual environment that sees the machine's torch), from --wheels or the
package index. Then each part runs in a process of its own with a time limit. A part that fails, or that lacks a package,
is recorded, and the next one runs. bench/results/gpu.json is written after every part. --device cpu --small goes through
the same code on a CPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / "build" / "gpu"
PARTS_FILE = Path(__file__).with_name("gpu_parts.py")
TORCH = (2, 11)  # the least version
TOTAL_S, INSTALL_S = 480, 100  # of all, and of the installation within it
LEARNER = ("torch", "torchvision", "timm", "numpy", "pillow", "safetensors")
ONNX = ("onnx", "onnxscript")
LIMITS_S = {"machine": 30, "speed": 150, "memory": 60, "serving": 90, "tests": 150}  # in the order in which they run
NEEDS: dict[str, tuple[str, ...]] = {
    "machine": ("torch",),
    "speed": LEARNER,
    "memory": LEARNER,
    "serving": (*LEARNER, *ONNX, "onnxruntime"),
    "tests": (*LEARNER, *ONNX, "onnxruntime", "matplotlib", "pytest"),
}


def distributions(python: str) -> dict[str, str]:
    """Return the versions of the packages that another Python sees, by lower-case name."""
    code = "import importlib.metadata as m, json; print(json.dumps([(d.name, d.version) for d in m.distributions()]))"
    out = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    return {str(name).lower().replace("_", "-"): version for name, version in json.loads(out) if name}


def missing_of(installed: dict[str, str], device: str) -> list[str]:
    """Return the packages that the parts need and this Python lacks; onnxruntime for CUDA is another distribution."""
    wanted = dict.fromkeys(package for packages in NEEDS.values() for package in packages)
    runtime = ("onnxruntime-gpu",) if device == "cuda" else ("onnxruntime", "onnxruntime-gpu")
    return [
        runtime[0] if package == "onnxruntime" else package
        for package in wanted
        if not any(name in installed for name in (runtime if package == "onnxruntime" else (package,)))
    ]


def torch_problem(python: str, device: str) -> str | None:
    """Return why this Python's torch cannot serve, or None."""
    code = "import torch; print(torch.__version__); print(torch.cuda.is_available())"
    ran = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if ran.returncode:
        return f"torch cannot be imported: {ran.stderr.strip().splitlines()[-1]}"
    version, available = ran.stdout.split()[-2:]
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < TORCH:
        return f"torch is {version}, needs {TORCH[0]}.{TORCH[1]} or newer"
    return "torch sees no GPU: check nvidia-smi and torch's build" if device == "cuda" and available != "True" else None


def install(packages: list[str], wheels: Path | None) -> tuple[str, str | None]:
    """Install packages beside the machine's own; return the Python that sees them, and the reason of a failure."""
    python = str(ENVIRONMENT / "bin" / "python")
    source = ["--no-index", "--find-links", str(wheels)] if wheels else []
    names = [f"{name}[cuda,cudnn]" if name == "onnxruntime-gpu" and not wheels else name for name in packages]
    began = time.monotonic()
    try:
        if not Path(python).exists():
            make = [sys.executable, "-m", "venv", "--system-site-packages", str(ENVIRONMENT)]
            subprocess.run(make, capture_output=True, text=True, check=True, timeout=INSTALL_S)
        for name in sorted(names, key=lambda name: "onnxruntime" in name):  # singly, the largest one last
            left = INSTALL_S - (time.monotonic() - began)
            pip = [python, "-m", "pip", "install", "--quiet", "--retries", "1", "--timeout", "10", *source, name]
            ran = subprocess.run(pip, capture_output=True, text=True, timeout=max(1, left))
            if ran.returncode:
                print(f"  {name} could not be installed: {(ran.stderr.strip().splitlines() or ['?'])[-1][:160]}")
    except (OSError, subprocess.SubprocessError) as error:
        return python if Path(python).exists() else sys.executable, str(error)[:300]
    return python, None


def run_part(python: str, name: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run one part in its own process group; return its document, or how it ended and the end of its output."""
    command = [python, str(PARTS_FILE), name, "--device", options.device]
    command += ["--small"] if options.small else []
    began = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, state = process.communicate(timeout=seconds)[0], "ok"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, state = process.communicate()[0], f"stopped at its limit of {seconds:.0f} s"
    took = {"seconds": round(time.monotonic() - began, 1)}
    lines = output.strip().splitlines()
    if state == "ok" and process.returncode == 0 and lines:
        return {"state": "ok", **took, **json.loads(lines[-1])}
    ended = state if state != "ok" else f"failed with exit code {process.returncode}"
    return {"state": ended, **took, "output": lines[-25:]}


def main(arguments: list[str] | None = None) -> int:
    """Run all parts; exit 1 when one of them is not ok."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes: to test this command, not to measure")
    parser.add_argument("--parts", nargs="+", choices=list(LIMITS_S), default=list(LIMITS_S))
    parser.add_argument("--wheels", type=Path, help="folder of wheels, where no package index can be reached")
    parser.add_argument("--no-install", action="store_true", help="use what is here")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu.json")
    options = parser.parse_args(arguments)
    began, python = time.monotonic(), sys.executable
    if ENVIRONMENT.exists() and not options.no_install:
        python = str(ENVIRONMENT / "bin" / "python")
    document: dict[str, Any] = {"device": options.device, "small": options.small, "problem": None, "parts": {}}

    def write() -> None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document | {"seconds": round(time.monotonic() - began, 1)}, indent=1) + "\n")

    installed = distributions(python)
    missing = missing_of(installed, options.device)
    problem = torch_problem(python, options.device) if "torch" not in missing else "torch is missing"
    print(f"missing: {', '.join(missing) or 'nothing'}; torch: {problem or installed['torch']}", flush=True)
    if problem:  # torch is never installed here: the machine's build fits its driver
        document |= {"problem": problem}
        write()
        return 1
    if missing and not options.no_install:
        python, document["problem"] = install(missing, options.wheels)
        installed = distributions(python)
        missing = missing_of(installed, options.device)
        print(f"still missing: {', '.join(missing) or 'nothing'}", flush=True)
    wanted = {package for packages in NEEDS.values() for package in packages}
    document["packages"] = {name: installed[name] for name in sorted({*wanted, "onnxruntime-gpu"} & installed.keys())}
    document["missing"] = missing
    for name in (name for name in LIMITS_S if name in options.parts):
        lacks = [
            m for m in missing if m in NEEDS[name] or (m.startswith("onnxruntime") and "onnxruntime" in NEEDS[name])
        ]
        left = min(LIMITS_S[name], TOTAL_S - (time.monotonic() - began))
        if lacks:
            part: dict[str, Any] = {"state": f"not run: missing {', '.join(lacks)}"}
        elif left < 10:
            part = {"state": f"not run: less than 10 s left of {TOTAL_S} s"}
        else:
            part = run_part(python, name, options, left)
        document["parts"][name] = part
        write()
        print(f"{name}: {part['state']}, {part.get('seconds', 0)} s", flush=True)
        if part["state"] != "ok":
            print("\n".join(f"    {line}" for line in part.get("output", [])[-8:]), flush=True)
    write()
    print(f"{options.out}: {time.monotonic() - began:.0f} s", flush=True)
    return 0 if all(part["state"] == "ok" for part in document["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
