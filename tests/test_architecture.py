"""The borders of the house, held at run time; the import contracts hold the rest (`make check`)."""

import subprocess
import sys
from pathlib import Path

from deploy.bundle import contract
from dicom.pixels import plate
from learner.round import manifest

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 300  # lines; a longer file does two things


def test_the_base_packages_never_load_torch_timm_or_onnxruntime():
    code = (
        "import agent.cli.main, dicom, dicom.node.listener, deploy, deploy.server.server, learner.evaluation.gate, learner.round.recipe, learner.round.manifest, sys;"
        "bad = {'torch', 'timm', 'onnxruntime', 'matplotlib'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_plates_have_one_version_in_all_three_packages():
    assert plate.PLATE_VERSION == contract.PLATE_VERSION == manifest.PLATE_VERSION


def test_no_file_is_longer_than_a_reader_can_hold():
    files = [path for name in ("agent", "dicom", "learner", "deploy") for path in (ROOT / name).rglob("*.py")]
    long = {str(path.relative_to(ROOT)): n for path in files if (n := len(path.read_text().splitlines())) > LONGEST}
    assert not long


def test_every_file_says_what_it_is():
    files = [path for name in ("agent", "dicom", "learner", "deploy") for path in (ROOT / name).rglob("*.py")]
    silent = [
        str(path.relative_to(ROOT)) for path in files if not path.read_text().lstrip().startswith(('"""', 'r"""'))
    ]
    assert not silent


def test_table_definitions_live_in_the_schema_alone():
    where = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "agent").rglob("*.py")
        if "CREATE TABLE" in path.read_text() or "CREATE TRIGGER" in path.read_text()
    ]
    assert where == ["agent/ledger/schema.py"]
