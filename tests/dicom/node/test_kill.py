"""Bad input 25: SIGKILL at random moments under load; runs the kill bench five times."""

import json
import subprocess
import sys
from pathlib import Path

from dicom.dataset.facts import DIGITAL_XRAY_PRESENTATION as DX
from dicom.dataset.part10 import EXPLICIT_LE
from dicom.node.listener import Listener, Node
from dicom.store.inbox import Inbox
from tests.support.dicom.pacs import data_set, xray
from tests.support.dicom.raw_scu import Scu

BENCH = Path(__file__).resolve().parents[3] / "bench" / "node" / "kill.py"


def test_25_every_acknowledged_image_survives_a_kill_byte_for_byte(tmp_path):
    out = tmp_path / "out.json"
    run = subprocess.run(
        [sys.executable, BENCH, "--kills", "5", "--senders", "3", "--store", tmp_path, "--out", out],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    total = json.loads(out.read_text())["total"]
    assert total["acknowledged"] > 5
    assert (total["lost"], total["broken"], total["left_at_start"]) == (0, 0, 0)


def test_25_unfinished_files_are_removed_after_a_kill_and_the_image_is_accepted_again(tmp_path):
    inbox = Inbox(tmp_path, 0)
    (tmp_path / ".tmp" / "left-over").write_bytes(b"half an image")
    listener = Listener(Node(port=0), inbox)
    listener.start()
    assert list((tmp_path / ".tmp").iterdir()) == []
    ds = xray()
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        assert scu.store(data_set(ds), DX, ds.SOPInstanceUID) == 0
    listener.stop()
    assert len(inbox.waiting()) == 1
