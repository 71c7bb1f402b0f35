"""Storage commitment: an image is committed only if its bytes on disk are those received."""

import json
import os
import threading

import pytest

from agent.ledger.database import Ledger
from agent.network import commitment_check
from dicom.client.sender import echo, send
from dicom.dataset.facts import COMPUTED_RADIOGRAPHY
from dicom.node import commitment
from dicom.node.commitment import CLASS_CONFLICT, NO_SUCH_INSTANCE, PROCESSING_FAILURE, SUCCESS
from tests.support.agent.images import put, save, take_in, xray
from tests.support.dicom.commitment_peer import ABSENT, CommitmentScu, pending_requests, references, running_sites
from tests.support.dicom.pacs import wait_for


@pytest.fixture
def pacs():
    scu = CommitmentScu().open()
    yield scu
    scu.close()


@pytest.fixture
def node(tmp_path, monkeypatch):
    """Return a function that starts the node of a site whose peer is a CommitmentScu; it returns (site, port)."""
    monkeypatch.setattr(commitment, "BACKOFF_S", (0.1,))
    with running_sites(tmp_path) as start:
        yield start


# Committed images


def test_an_image_that_has_just_arrived_is_committed_from_the_inbox(node, pacs):
    site, port = node(pacs)
    images = [xray(n) for n in range(3)]
    assert [status for _, status in send(images, "127.0.0.1", port, "CXRLOOP")] == [0] * 3
    assert pacs.request(port, references(*images)) == SUCCESS
    assert pacs.last_report() == (1, {ds.SOPInstanceUID for ds in images}, {})
    assert wait_for(lambda: pending_requests(site) == [])


def test_admitted_rejected_and_quarantined_images_are_committed(site):
    admitted, knee, bare = xray(1), xray(2, body_part="KNEE"), xray(3)
    del bare.PixelData
    for ds in (admitted, knee, bare):
        put(site, ds)
    with site.ledger() as ledger:
        take_in(site, ledger)
        states = {row["state"] for row in ledger.rows("SELECT state FROM image")}
    assert states == {"stored", "rejected", "quarantined"}
    assert commitment_check.check(site, references(admitted, knee, bare)) == [SUCCESS] * 3


def test_an_image_nested_too_deeply_is_quarantined_with_its_uid_and_committed(site):
    """The node follows sequences of any depth and answers Success; pydicom's reader in the intake fails on them."""
    ds = xray(1)
    file = save(ds, site.root / "run" / "image.dcm").read_bytes()
    opened = bytes.fromhex("400030a7 53510000 ffffffff feff00e0 ffffffff")
    closed = bytes.fromhex("feff0de0 00000000 feffdde0 00000000")
    at = file.index(bytes.fromhex("e07f1000"))
    site.inbox.put(file[:at] + 1000 * opened + 1000 * closed + file[at:])
    with site.ledger() as ledger:
        take_in(site, ledger)
        row = ledger.row("SELECT * FROM image")
    assert (row["state"], row["reason"]) == ("quarantined", "data set not readable: RecursionError")
    assert row["patient_key"].startswith("p")
    assert commitment_check.check(site, references(ds)) == [SUCCESS]


def test_an_image_never_sent_fails_and_the_others_are_committed(node, pacs):
    _, port = node(pacs)
    ds = xray(0)
    list(send([ds], "127.0.0.1", port, "CXRLOOP"))
    pacs.request(port, [*references(ds), ABSENT])
    assert pacs.last_report() == (2, {ds.SOPInstanceUID}, {ABSENT[1]: NO_SUCH_INSTANCE})


@pytest.fixture
def kept(site):
    """Return (site, reference, file) of a site with one stored image."""
    ds = xray(0)
    put(site, ds)
    with site.ledger() as ledger:
        take_in(site, ledger)
        row = ledger.row("SELECT * FROM image")
    return site, *references(ds), site.root / "store" / row["original"]


def test_one_byte_changed_on_disk_is_a_processing_failure(kept):
    site, reference, path = kept
    assert commitment_check.check(site, [reference]) == [SUCCESS]
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert commitment_check.check(site, [reference]) == [PROCESSING_FAILURE]


def test_a_missing_or_truncated_file_is_not_committed(kept):
    site, reference, path = kept
    os.truncate(path, path.stat().st_size - 100)
    assert commitment_check.check(site, [reference]) == [PROCESSING_FAILURE]
    path.unlink()
    assert commitment_check.check(site, [reference]) == [NO_SUCH_INSTANCE]


def test_a_wrong_sop_class_is_a_conflict_in_store_and_inbox(kept):
    site, (_, sop_uid), _ = kept
    assert commitment_check.check(site, [(COMPUTED_RADIOGRAPHY, sop_uid)]) == [CLASS_CONFLICT]
    waiting = xray(7)
    put(site, waiting)
    assert commitment_check.check(site, [(COMPUTED_RADIOGRAPHY, waiting.SOPInstanceUID)]) == [CLASS_CONFLICT]


def test_a_truncated_image_in_the_inbox_is_not_committed(site):
    ds = xray(0)
    path = put(site, ds)
    os.truncate(path, path.stat().st_size - 1)
    assert commitment_check.check(site, references(ds)) == [PROCESSING_FAILURE]


def test_a_good_copy_in_the_inbox_does_not_hide_a_damaged_one_in_the_store(kept):
    site, reference, path = kept
    site.inbox.put(path.read_bytes())
    assert commitment_check.check(site, [reference]) == [SUCCESS]
    path.write_bytes(b"")
    assert commitment_check.check(site, [reference]) != [SUCCESS]


def test_a_damaged_image_is_repaired_when_it_is_sent_again_with_a_notice(kept, caplog):
    site, reference, path = kept
    sent = path.read_bytes()
    path.write_bytes(sent[:-7])
    assert commitment_check.check(site, [reference]) == [PROCESSING_FAILURE]
    assert f"originals/{path.parent.name}/{path.name} is damaged" in caplog.text
    site.inbox.put(sent)
    with site.ledger() as ledger:
        take_in(site, ledger)
        notices = [row["kind"] for row in ledger.rows("SELECT kind FROM notice")]
    assert commitment_check.check(site, [reference]) == [SUCCESS]
    assert notices == ["damaged"]


def test_images_are_committed_at_every_moment_of_their_intake(site):
    images = [xray(n) for n in range(40)]
    for n, ds in enumerate(images):
        put(site, ds, f"{n}.dcm")

    def intake():
        with site.ledger() as ledger:
            take_in(site, ledger)

    taking = threading.Thread(target=intake)
    taking.start()
    answers = [commitment_check.check(site, references(*images))]
    while taking.is_alive():
        answers.append(commitment_check.check(site, references(*images)))
    assert site.inbox.waiting() == []
    assert [answer for answer in answers if answer != [SUCCESS] * 40] == []


def test_the_ledger_is_read_without_write_permission_in_its_folder(kept):
    site, reference, _ = kept
    ledger = site.root / "ledger.db"
    for name in ("-wal", "-shm"):
        ledger.with_name(ledger.name + name).unlink(missing_ok=True)
    before = sorted(path.name for path in site.root.iterdir())
    assert commitment_check.check(site, [reference]) == [SUCCESS]
    with Ledger(ledger):  # a running agent
        assert commitment_check.check(site, [reference]) == [SUCCESS]
    assert sorted(path.name for path in site.root.iterdir()) == before


def test_while_the_ledger_is_unreadable_a_request_waits_and_is_not_denied(node, pacs):
    site, port = node(pacs)
    ds = xray(0)
    put(site, ds)
    with site.ledger() as ledger:
        take_in(site, ledger)
    place, hidden = site.root / "ledger.db", site.root / "ledger.hidden"
    place.rename(hidden)
    place.write_bytes(b"not a database")
    assert pacs.request(port, references(ds)) == SUCCESS
    assert wait_for(lambda: pending_requests(site) != []) and pacs.reports == []
    hidden.rename(place)
    assert pacs.last_report() == (1, {ds.SOPInstanceUID}, {})


def test_looking_up_a_thousand_uids_uses_the_index(site):
    with site.ledger() as ledger:
        sql = "EXPLAIN QUERY PLAN SELECT sop_uid FROM image WHERE sop_uid IN (SELECT value FROM json_each(?))"
        plan = " ".join(row["detail"] for row in ledger.rows(sql, json.dumps(["1.2"] * 1000)))
    assert "SCAN image" not in plan


# Refused requests


def test_invalid_requests_are_refused_and_not_kept(node, pacs):
    site, port = node(pacs)
    good = [ABSENT]
    assert pacs.request(port, good, action=2) == commitment.NO_SUCH_ACTION
    assert pacs.request(port, good, instance="1.2.840.10008.1.20.1.9") == commitment.NO_SUCH_INSTANCE
    assert pacs.request(port, []) == commitment.INVALID_ARGUMENT
    assert pacs.request(port, [("1.2", "1.2/../x")]) == commitment.INVALID_ARGUMENT
    assert pacs.request(port, good, calling="STRANGER") == commitment.NOT_AUTHORISED
    assert pending_requests(site) == []
    assert echo("127.0.0.1", port, "CXRLOOP")


def test_a_peer_that_never_accepts_reports_is_refused_at_the_limit(node, monkeypatch):
    monkeypatch.setattr(commitment, "MOST_PENDING", 2)
    scu = CommitmentScu()
    site, port = node(scu)
    assert [scu.request(port, [ABSENT]) for _ in range(3)] == [SUCCESS, SUCCESS, commitment.RESOURCE_LIMITATION]
    assert len(pending_requests(site)) == 2


def test_a_full_disk_is_a_resource_limitation(node, pacs):
    site, port = node(pacs)
    folder = site.root / "node" / "commitment"
    folder.rmdir()
    assert pacs.request(port, [ABSENT]) == commitment.RESOURCE_LIMITATION
    folder.mkdir()
    assert pacs.request(port, [ABSENT]) == SUCCESS
