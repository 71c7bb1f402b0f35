"""The mark on the disk: associations are refused before it is full, and taken again once there is room."""

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


def test_the_mark_turns_once_and_back_only_with_room_to_spare(caplog):
    disk = Disk(101 << 20)
    full = Watermark(disk, 100)
    assert full() is None
    disk.free = 99 << 20
    with caplog.at_level(logging.INFO, "cxrloop.listen"):
        said = [full() for _ in range(5)]
        disk.free = 101 << 20
        assert full() is not None
        disk.free = 107 << 20
        assert full() is None
    assert "99 MB free" in said[0] and "under 100 MB" in said[0]
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]


def test_a_mark_of_zero_refuses_nobody():
    assert Watermark(Disk(0), 0)() is None


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 40 MB, where the system lets us have one, else a file system whose size a test can't change."""
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


def test_associations_are_refused_before_the_disk_is_full_and_taken_again_without_a_restart(small_disk):
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
        assert store_raw(running, *sent) == 0  # who is in already is served
        if real:
            ballast.write_bytes(bytes(38 << 20))
            assert store_raw(running, *sent) == OUT_OF_RESOURCES  # down to node.min_free_mb
        running.release()
        ballast.unlink()
        disk.free = 40 << 20
        assert send_once(listener.port, *sent) == 0
    finally:
        listener.stop()


def test_status_says_that_associations_are_refused_and_is_degraded(tmp_path):
    free_mb = free_bytes(tmp_path) >> 20
    site = make_site(tmp_path / "site", retention={"refuse_free_mb": free_mb + 4096})
    with site.ledger() as ledger:
        said = status(site, ledger)
    alert = next(alert for alert in said["alerts"] if alert["kind"] == "disk")
    assert "retention.refuse_free_mb" in alert["detail"]
    assert said["degraded"]
