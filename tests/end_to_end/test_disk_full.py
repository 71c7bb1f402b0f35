"""A disk that is full and then is not, on a real small file system: the node, the intake and the ledger go on by themselves.

The real processes live on the disk; the images, their senders and the hand that frees space are outside it.
"""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.ledger import audit
from agent.site.site import Site
from dicom.dataset.facts import DIGITAL_XRAY_PRESENTATION as DX
from dicom.dataset.part10 import EXPLICIT_LE, open_envelope
from dicom.node.reception import OUT_OF_RESOURCES
from dicom.store.inbox import Inbox
from tests.conftest import make_site
from tests.support.dicom.pacs import data_set, save, wait_for, xray
from tests.support.dicom.raw_scu import A_ASSOCIATE_AC, IMPLICIT, VERIFICATION, Scu, answers_echo
from tests.support.small_disk import small_disk

pytestmark = pytest.mark.peer("mount")

HERE = Path(__file__).resolve().parents[2]  # whose code runs: in another namespace the working folder is /
DISK_MB = 9
ECHO = 3  # presentation context
EMPTY_LOG = "import sqlite3, sys; sys.exit(sqlite3.connect(sys.argv[1]).execute('PRAGMA wal_checkpoint(TRUNCATE)').fetchone()[0])"
PATIENCE_S = 150  # a limit, for a machine that is busy with other things


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", DISK_MB) as disk:
        yield disk


@contextmanager
def running(disk, tmp_path, parts="listen", begin=lambda: None):
    """A site on the disk and the real node on it: the site as others see it, its port, its log, its processes."""
    keys = {"node": {"min_free_mb": 0}, "retention": {"refuse_free_mb": 0}}  # down to the last byte
    made = make_site(tmp_path / "made", **keys)
    shutil.copytree(made.root, disk.seen / "site")
    begin()
    log = tmp_path / "log"
    settings = str(disk.place / "site" / "appliance.toml")
    command = disk.inside(sys.executable, "-m", "agent.cli.main", "serve", "--only", parts, "--config", settings)
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, env={**os.environ, "PYTHONPATH": str(HERE)})
    try:
        if "listen" in parts:
            assert wait_for(lambda: answers_echo(made.config.node.port), PATIENCE_S), log.read_text()
        yield Running(disk.seen / "site", made.config.node.port, process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@dataclass
class Running:
    """The node's process on the small disk, and its site folder as others see it."""

    site: Path
    port: int
    process: subprocess.Popen
    log: Path

    @property
    def inbox(self) -> Inbox:
        return Inbox(self.site / "inbox", 0)

    def says(self, *words: str) -> bool:
        """Whether any of these words is in its log, now or soon."""
        return wait_for(lambda: any(one in self.log.read_text() for one in words), PATIENCE_S)


def body(path):
    """The data set of a file."""
    with path.open("rb") as stream:
        offset = open_envelope(stream).offset
    return path.read_bytes()[offset:]


def everything(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_images_come_until_a700_nothing_partial_stays_and_the_next_image_after_space_is_freed_is_there(disk, tmp_path):
    images = [xray(seed, side=900, bits=12) for seed in range(8)]  # 1.6 MB each
    sent = {str(one.SOPInstanceUID): data_set(one) for one in images}
    with running(disk, tmp_path) as node, Scu(node.port) as scu:
        inbox = node.site / "inbox"
        assert scu.associate([(DX, EXPLICIT_LE), (VERIFICATION, IMPLICIT)]) == A_ASSOCIATE_AC
        statuses = {uid: scu.store(data, DX, uid) for uid, data in sent.items()}
        held = [uid for uid, status in statuses.items() if status == 0]
        assert 4 <= len(held) < 8
        assert list(statuses.values()) == [0] * len(held) + [OUT_OF_RESOURCES] * (8 - len(held))
        ballast = disk.fill()  # now not one byte is left, for a temporary file's first either
        last = images[-1]
        assert scu.store(data_set(last), DX, last.SOPInstanceUID) == OUT_OF_RESOURCES
        assert sorted(body(path) for path in everything(inbox)) == sorted(sent[uid] for uid in held)
        assert scu.echo(ECHO) == 0
        assert answers_echo(node.port)
        ballast.unlink()
        everything(inbox)[0].unlink()  # as the intake does, or a person
        assert scu.store(data_set(last), DX, last.SOPInstanceUID) == 0
        assert scu.release()
        there = everything(inbox)
        assert data_set(last) in [body(path) for path in there]
        assert len(there) == len(held)


def hold(disk, node):
    """Stop the process between two transactions and empty its write-ahead log: the next one needs room on the disk."""
    while True:
        node.process.send_signal(signal.SIGSTOP)
        if (
            subprocess.run(disk.inside(sys.executable, "-c", EMPTY_LOG, disk.place / "site" / "ledger.db")).returncode
            == 0
        ):
            return
        node.process.send_signal(signal.SIGCONT)


def put(inbox, ds, tmp_path):
    """Lay an image into the inbox; its bytes."""
    data = save(ds, tmp_path / "image.dcm").read_bytes()
    inbox.put(data)
    return data


def nothing_is_lost(disk, tmp_path, images):
    """What the stopped node left: a sound ledger, a true audit, a row an image, and each image's bytes."""
    shutil.copytree(disk.seen / "site", tmp_path / "after")
    site = Site.open(tmp_path / "after" / "appliance.toml")
    with site.ledger() as ledger:
        assert ledger.value("PRAGMA integrity_check") == "ok"
        assert audit.verify(ledger, site.root / "audit.heads", site.key("signing.pub"))["ok"]
        rows = ledger.rows("SELECT * FROM image ORDER BY id")
        assert [site.store.path(row["original"]).read_bytes() for row in rows] == images
        assert ledger.value("SELECT count(*) FROM receipt") == len(images)
        assert sum(ledger.counters()[state] for state in ("stored", "rejected")) == len(images)
    assert list(site.store.folder.glob("*/.tmp-*")) == []


def test_a_full_disk_stops_the_ledger_and_the_store_which_lose_nothing_and_go_on(disk, tmp_path):
    ledger = ("database or disk is full", "disk I/O error")  # the log can't grow, or its index can't
    turns = [("LL", ledger), ("PA", ("No space left on device",))]  # a lateral image needs no plate
    images = []
    with running(disk, tmp_path, "learn") as node:
        assert node.says("learn ready")
        for seed, (view, words) in enumerate(turns):
            hold(disk, node)
            images.append(put(node.inbox, xray(seed, view=view), tmp_path))
            ballast = disk.fill()
            node.process.send_signal(signal.SIGCONT)
            assert node.says(*words)
            assert len(node.inbox.waiting()) == 1
            ballast.unlink()
            assert wait_for(lambda: not node.inbox.waiting(), PATIENCE_S), node.log.read_text()[-3000:]
    nothing_is_lost(disk, tmp_path, images)


def test_a_node_that_starts_on_a_full_disk_goes_on_as_soon_as_there_is_room(disk, tmp_path):
    images = []

    def begin():
        images.append(put(Inbox(disk.seen / "site" / "inbox", 0), xray(0), tmp_path))
        disk.fill()

    with running(disk, tmp_path, "learn", begin) as node:
        assert node.says("disk")
        (disk.seen / "ballast").unlink()
        assert wait_for(lambda: not node.inbox.waiting(), PATIENCE_S), node.log.read_text()[-3000:]
    nothing_is_lost(disk, tmp_path, images)


def test_a_head_of_the_audit_that_the_disk_cut_off_is_signed_anew(disk, tmp_path):
    site, heads = make_site(tmp_path / "site"), disk.seen / "audit.heads"
    with site.ledger() as ledger:
        audit.anchor(ledger, heads, site.key("signing.key"))
        ballast = disk.fill()
        with pytest.raises(OSError, match="No space left"):  # as soon as the file's last page is full
            while True:
                with ledger.transaction():
                    audit.append(ledger, "test", "a line", "to fill a page")
                audit.anchor(ledger, heads, site.key("signing.key"))
        assert not heads.read_text().endswith("\n")
        assert audit.verify(ledger, heads, site.key("signing.pub"))["ok"]
        ballast.unlink()
        audit.anchor(ledger, heads, site.key("signing.key"))
        last = ledger.value("SELECT max(seq) FROM audit")
        assert [int(line.split(" ")[0]) for line in heads.read_text().splitlines()] == list(range(1, last + 1))
        assert audit.verify(ledger, heads, site.key("signing.pub"))["ok"]
