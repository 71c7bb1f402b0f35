"""The limit on the disk: associations are rejected before it is full, and accepted again once there is room."""

import logging
import os
import subprocess

import pytest

from agent.network.watermark import Watermark, free_bytes
from agent.service.status import status
from dicom.client.sender import echo
from dicom.node.listener import Listener, Node
from dicom.node.reception import OUT_OF_RESOURCES
from dicom.store.inbox import Inbox
from tests.conftest import make_site
from tests.support.agent.images import xray
from tests.support.dicom.pacs import associate, data_set, send_once, store_raw


class Disk:
    """Free bytes that a test sets."""

    def __init__(self, free: int) -> None:
        self.free = free

    def __call__(self) -> int:
        return self.free


def test_the_limit_has_hysteresis_and_logs_each_change_once(caplog):
    disk = Disk(101 << 20)
    full = Watermark(disk, 100)
    assert full() is None
    disk.free = 99 << 20
    with caplog.at_level(logging.INFO, "cxrloop.listen"):
        reasons = [full() for _ in range(5)]
        disk.free = 101 << 20
        assert full() is not None
        disk.free = 107 << 20
        assert full() is None
    assert "99 MB free" in reasons[0] and "below 100 MB" in reasons[0]
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]


def test_a_limit_of_zero_rejects_no_association():
    assert Watermark(Disk(0), 0)() is None


@pytest.fixture
def small_disk(tmp_path):
    """(folder, True) on a file system of 40 MB, or (folder, False) where this system allows no mount."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = (
        os.geteuid() == 0
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(place)], capture_output=True
        ).returncode
        == 0
    )
    yield place, mounted
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_associations_are_rejected_on_a_nearly_full_disk_and_accepted_again_without_restart(small_disk):
    place, real = small_disk
    disk = Disk(40 << 20)
    free = (lambda: free_bytes(place)) if real else disk
    inbox = Inbox(place / "inbox", 4 << 20)
    listener = Listener(Node(port=0), inbox, full=Watermark(free, 16))
    listener.start()
    ds, ballast = xray(1), place / "ballast"
    sent = (data_set(ds), ds.SOPInstanceUID, ds.SOPClassUID)
    try:
        running = associate(listener.port, [(ds.SOPClassUID, ds.file_meta.TransferSyntaxUID)])
        ballast.write_bytes(bytes(26 << 20))
        disk.free = 14 << 20
        refused = associate(listener.port, [(ds.SOPClassUID, ds.file_meta.TransferSyntaxUID)])
        answer = refused.acceptor.primitive
        assert refused.is_rejected
        assert (answer.result, answer.result_source, answer.diagnostic) == (2, 3, 1)  # transient, congestion
        assert echo("127.0.0.1", listener.port, "CXRLOOP")  # a monitor is still answered
        assert store_raw(running, *sent) == 0  # a running association is still served
        if real:
            ballast.write_bytes(bytes(38 << 20))
            assert store_raw(running, *sent) == OUT_OF_RESOURCES  # down to node.min_free_mb
        running.release()
        ballast.unlink()
        disk.free = 40 << 20
        assert send_once(listener.port, *sent) == 0
    finally:
        listener.stop()


def test_status_is_degraded_while_associations_are_rejected(tmp_path):
    free_mb = free_bytes(tmp_path) >> 20
    site = make_site(tmp_path / "site", retention={"refuse_free_mb": free_mb + 4096})
    with site.ledger() as ledger:
        answer = status(site, ledger)
    alert = next(alert for alert in answer["alerts"] if alert["kind"] == "disk")
    assert "retention.refuse_free_mb" in alert["detail"]
    assert answer["degraded"]
