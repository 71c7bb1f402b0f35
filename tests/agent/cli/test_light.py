"""Which libraries a command loads: a short one must not pay for what only long ones need (bench/cli_time.py)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SITES = Path(__file__).resolve().parents[2] / "sites"
RUN = """
import json, sys
from agent.cli.main import main
sys.argv = ["cxrloop", *json.loads(sys.argv[1])]
try:
    main()
except SystemExit as ended:
    code = ended.code or 0
sys.stderr.write("\\n" + json.dumps([code, sorted(sys.modules)]))
"""
DICOM = {"pydicom", "pynetdicom", "highdicom", "imagecodecs", "PIL", "dicomweb_client"}
SERVER = {"starlette", "uvicorn", "prometheus_client", "apscheduler", "watchdog", "onnxruntime", "torch"}
HEAVY = {"numpy", "httpx", "sqlite_utils", "rich", *DICOM, *SERVER}


def loaded(*words: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", RUN, json.dumps(words)], capture_output=True, text=True)
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert code in (0, 3), done.stderr
    return set(modules)


@pytest.fixture(scope="module")
def current(tmp_path_factory) -> Path:
    """A site of version 0.1.0 whose ledger is migrated."""
    folder = tmp_path_factory.mktemp("old") / "site"
    shutil.copytree(SITES / "0.1.0", folder)
    assert "sqlite_utils" in loaded("images", "ls", "--config", str(folder))
    return folder


@pytest.mark.parametrize("words", [("--version",), ("--help",)])
def test_help_and_version_load_no_library_but_typer(words):
    assert loaded(*words) & {"pydantic", "cryptography", *HEAVY} == set()


@pytest.mark.parametrize("words", [("images", "--help"), ("round", "run", "--help"), ("explain", "--help")])
def test_the_help_of_a_command_loads_no_library_but_those_of_typer(words):
    assert loaded(*words) & {"cryptography", *HEAVY} == set()


@pytest.mark.parametrize(
    "words", [("status",), ("images", "ls"), ("models", "ls"), ("round", "ls"), ("verdict", "r0002"), ("config", "show")],
    ids=" ".join,
)  # fmt: skip
def test_a_command_that_only_reads_loads_neither_dicom_nor_numpy_nor_a_server(current, words):
    assert loaded(*words, "--config", str(current)) & HEAVY == set()
