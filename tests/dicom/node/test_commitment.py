"""Storage commitment: answered for what is on disk, byte for byte."""

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
from tests.support.dicom.commitment_peer import ABSENT, Pacs, nodes, of, pending
from tests.support.dicom.pacs import wait_for


@pytest.fixture
def pacs():
    one = Pacs().open()
    yield one
    one.close()


@pytest.fixture
def node(tmp_path, monkeypatch):
    """Starts the node of a site whose peer is a Pacs; gives (site, port)."""
    monkeypatch.setattr(commitment, "BACKOFF_S", (0.1,))
    with nodes(tmp_path) as start:
        yield start


# What is held


def test_an_image_that_has_just_arrived_is_committed_from_the_inbox(node, pacs):
    site, port = node(pacs)
    images = [xray(n) for n in range(3)]
    assert [status for _, status in send(images, "127.0.0.1", port, "CXRLOOP")] == [0] * 3
    assert pacs.ask(port, of(*images)) == SUCCESS
    assert pacs.told() == (1, {ds.SOPInstanceUID for ds in images}, {})
    assert wait_for(lambda: pending(site) == [])


def test_an_image_that_was_taken_in_is_committed_and_so_is_one_that_was_set_aside(site):
    admitted, knee, bare = xray(1), xray(2, body_part="KNEE"), xray(3)
    del bare.PixelData
    for ds in (admitted, knee, bare):
        put(site, ds)
    with site.ledger() as ledger:
        take_in(site, ledger)
        states = {row["state"] for row in ledger.rows("SELECT state FROM image")}
    assert states == {"stored", "rejected", "quarantined"}
    assert commitment_check.check(site, of(admitted, knee, bare)) == [SUCCESS] * 3


def test_an_image_too_deep_to_be_read_is_set_aside_under_its_own_name_and_committed(site):
    """The node follows sequences of any depth, and said Success; the reader of the intake recurses, and gives up."""
    ds = xray(1)
    whole = save(ds, site.root / "run" / "image.dcm").read_bytes()
    opened = bytes.fromhex("400030a7 53510000 ffffffff feff00e0 ffffffff")
    closed = bytes.fromhex("feff0de0 00000000 feffdde0 00000000")
    at = whole.index(bytes.fromhex("e07f1000"))
    site.inbox.put(whole[:at] + 1000 * opened + 1000 * closed + whole[at:])
    with site.ledger() as ledger:
        take_in(site, ledger)
        row = ledger.row("SELECT * FROM image")
    assert (row["state"], row["reason"]) == ("quarantined", "data set not readable: RecursionError")
    assert row["patient_key"].startswith("p")
    assert commitment_check.check(site, of(ds)) == [SUCCESS]


def test_one_that_was_never_sent_fails_and_the_others_are_committed(node, pacs):
    _, port = node(pacs)
    ds = xray(0)
    list(send([ds], "127.0.0.1", port, "CXRLOOP"))
    pacs.ask(port, [*of(ds), ABSENT])
    assert pacs.told() == (2, {ds.SOPInstanceUID}, {ABSENT[1]: NO_SUCH_INSTANCE})


@pytest.fixture
def kept(site):
    """A site with one image taken in; gives (site, reference, its file)."""
    ds = xray(0)
    put(site, ds)
    with site.ledger() as ledger:
        take_in(site, ledger)
        row = ledger.row("SELECT * FROM image")
    return site, *of(ds), site.root / "store" / row["original"]


def test_one_byte_changed_on_disk_is_a_processing_failure(kept):
    site, reference, path = kept
    assert commitment_check.check(site, [reference]) == [SUCCESS]
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert commitment_check.check(site, [reference]) == [PROCESSING_FAILURE]


def test_a_file_that_is_gone_or_cut_short_is_not_committed(kept):
    site, reference, path = kept
    os.truncate(path, path.stat().st_size - 100)
    assert commitment_check.check(site, [reference]) == [PROCESSING_FAILURE]
    path.unlink()
    assert commitment_check.check(site, [reference]) == [NO_SUCH_INSTANCE]


def test_another_sop_class_than_the_images_is_a_conflict_in_store_and_inbox(kept):
    site, (_, sop_uid), _ = kept
    assert commitment_check.check(site, [(COMPUTED_RADIOGRAPHY, sop_uid)]) == [CLASS_CONFLICT]
    waiting = xray(7)
    put(site, waiting)
    assert commitment_check.check(site, [(COMPUTED_RADIOGRAPHY, waiting.SOPInstanceUID)]) == [CLASS_CONFLICT]


def test_an_image_in_the_inbox_that_is_cut_short_is_not_committed(site):
    ds = xray(0)
    path = put(site, ds)
    os.truncate(path, path.stat().st_size - 1)
    assert commitment_check.check(site, of(ds)) == [PROCESSING_FAILURE]


def test_an_intact_copy_in_the_inbox_does_not_hide_a_damaged_one_in_the_store(kept):
    site, reference, path = kept
    site.inbox.put(path.read_bytes())
    assert commitment_check.check(site, [reference]) == [SUCCESS]
    path.write_bytes(b"")
    assert commitment_check.check(site, [reference]) != [SUCCESS]


def test_a_damaged_image_that_is_sent_again_is_whole_again_and_said(kept, caplog):
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


def test_images_are_found_at_every_moment_of_their_intake(site):
    images = [xray(n) for n in range(40)]
    for n, ds in enumerate(images):
        put(site, ds, f"{n}.dcm")

    def intake():
        with site.ledger() as ledger:
            take_in(site, ledger)

    taking = threading.Thread(target=intake)
    taking.start()
    answers = [commitment_check.check(site, of(*images))]
    while taking.is_alive():
        answers.append(commitment_check.check(site, of(*images)))
    assert site.inbox.waiting() == []
    assert [answer for answer in answers if answer != [SUCCESS] * 40] == []


def test_the_ledger_is_read_without_the_right_to_write_beside_it(kept):
    site, reference, _ = kept
    ledger = site.root / "ledger.db"
    for name in ("-wal", "-shm"):
        ledger.with_name(ledger.name + name).unlink(missing_ok=True)
    before = sorted(path.name for path in site.root.iterdir())
    assert commitment_check.check(site, [reference]) == [SUCCESS]
    with Ledger(ledger):  # a running agent
        assert commitment_check.check(site, [reference]) == [SUCCESS]
    assert sorted(path.name for path in site.root.iterdir()) == before


def test_while_the_ledger_cannot_be_read_a_request_waits_and_nothing_is_denied(node, pacs):
    site, port = node(pacs)
    ds = xray(0)
    put(site, ds)
    with site.ledger() as ledger:
        take_in(site, ledger)
    place, hidden = site.root / "ledger.db", site.root / "ledger.hidden"
    place.rename(hidden)
    place.write_bytes(b"not a database")
    assert pacs.ask(port, of(ds)) == SUCCESS
    assert wait_for(lambda: pending(site) != []) and pacs.reports == []
    hidden.rename(place)
    assert pacs.told() == (1, {ds.SOPInstanceUID}, {})


def test_looking_up_a_thousand_uids_uses_the_index(site):
    with site.ledger() as ledger:
        sql = "EXPLAIN QUERY PLAN SELECT sop_uid FROM image WHERE sop_uid IN (SELECT value FROM json_each(?))"
        plan = " ".join(row["detail"] for row in ledger.rows(sql, json.dumps(["1.2"] * 1000)))
    assert "SCAN image" not in plan


# What is refused


def test_requests_that_make_no_sense_are_refused_and_leave_nothing(node, pacs):
    site, port = node(pacs)
    good = [ABSENT]
    assert pacs.ask(port, good, action=2) == commitment.NO_SUCH_ACTION
    assert pacs.ask(port, good, instance="1.2.840.10008.1.20.1.9") == commitment.NO_SUCH_INSTANCE
    assert pacs.ask(port, []) == commitment.INVALID_ARGUMENT
    assert pacs.ask(port, [("1.2", "1.2/../x")]) == commitment.INVALID_ARGUMENT
    assert pacs.ask(port, good, calling="STRANGER") == commitment.NOT_AUTHORISED
    assert pending(site) == []
    assert echo("127.0.0.1", port, "CXRLOOP")


def test_a_peer_that_asks_endlessly_and_never_listens_is_refused(node, monkeypatch):
    monkeypatch.setattr(commitment, "MOST_PENDING", 2)
    deaf = Pacs()
    site, port = node(deaf)
    assert [deaf.ask(port, [ABSENT]) for _ in range(3)] == [SUCCESS, SUCCESS, commitment.RESOURCE_LIMITATION]
    assert len(pending(site)) == 2


def test_a_full_disk_is_a_resource_limitation(node, pacs):
    site, port = node(pacs)
    folder = site.root / "node" / "commitment"
    folder.rmdir()
    assert pacs.ask(port, [ABSENT]) == commitment.RESOURCE_LIMITATION
    folder.mkdir()
    assert pacs.ask(port, [ABSENT]) == SUCCESS
