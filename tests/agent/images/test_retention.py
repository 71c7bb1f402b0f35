"""Retention: originals and rejected files are dropped after their time, and their rows stay."""

import shutil
import sqlite3
from datetime import UTC, datetime, timedelta

import pytest
from sqlite_utils import Database

from agent.errors import Problem
from agent.images import labels, retention
from agent.images.records import ImageRecord, original_path
from agent.ledger import schema
from agent.ledger.database import Ledger, utc
from agent.network import commitment_check
from agent.results import explain, reporting
from agent.rounds import golden_set
from agent.service.scheduler import housekeeping
from agent.site.site import Site
from dicom.dataset.facts import DIGITAL_XRAY_PRESENTATION
from dicom.node.commitment import NO_SUCH_INSTANCE
from tests.conftest import make_site
from tests.support.agent.crash_line import DIED, count_steps, in_child, write_labels
from tests.support.agent.images import put, take_in, xray
from tests.support.agent.models import InProcessServer, add_model
from tests.support.deploy.model_server import FINDINGS

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


def make_retention_site(folder, **sections) -> Site:
    keys = {"originals_days": 30, "aside_days": 10}
    return make_site(folder, site={"findings": list(FINDINGS)}, retention=keys, **sections)


@pytest.fixture
def site(tmp_path):
    return make_retention_site(tmp_path / "site")


def scored_rows(site: Site, ledger: Ledger, *seeds: int) -> list[dict]:
    """Take in and score one image for each seed; return all rows."""
    for seed in seeds:
        put(site, xray(seed), f"{seed}.dcm")
    take_in(site, ledger)
    if not ledger.value("SELECT 1 FROM bundle"):
        add_model(site, ledger, 1)
    while reporting.score_waiting(site, ledger, InProcessServer(site, ledger)):  # type: ignore[arg-type]
        pass
    return ledger.rows("SELECT * FROM image ORDER BY id")


def has_original(site: Site, row: dict) -> bool:
    return site.store.path(row["original"]).exists()


def test_an_original_is_dropped_after_its_days_and_plate_and_score_stay(site):
    with site.ledger() as ledger:
        (row,) = scored_rows(site, ledger, 1)
        assert retention.step(site, ledger, NOW + 29 * DAY) == 0
        assert has_original(site, row)
        assert retention.step(site, ledger, NOW + 31 * DAY) == 1
        after = ledger.rows("SELECT * FROM image")[0]
        assert not has_original(site, row)
        assert after["dropped_at"] == utc(NOW + 31 * DAY)
        assert {**after, "dropped_at": None} == row
        assert site.store.plate(after["plate"]).shape == (512, 512)
        assert ledger.value("SELECT count(*) FROM prediction") == 1
        assert ledger.counters()["dropped"] == 1
        assert retention.step(site, ledger, NOW + 60 * DAY) == 0


def test_an_image_without_a_score_keeps_its_original(site):
    put(site, xray(1))
    with site.ledger() as ledger:
        take_in(site, ledger)
        assert retention.step(site, ledger, NOW + 3000 * DAY) == 0


def test_zero_days_keep_everything(tmp_path):
    site = make_site(tmp_path / "site", site={"findings": list(FINDINGS)})
    with site.ledger() as ledger:
        scored_rows(site, ledger, 1)
        site.inbox.put(b"not DICOM")
        take_in(site, ledger)
        assert retention.step(site, ledger, NOW + 3000 * DAY) == 0


def test_an_image_of_a_golden_set_keeps_its_original(tmp_path):
    site = make_retention_site(
        tmp_path / "site", patients={"golden": 0.9, "golden_next": 0.0, "calibration": 0.0, "validation": 0.0}
    )
    with site.ledger() as ledger:
        rows = scored_rows(site, ledger, *range(1, 9))
        chosen = [row for row in rows if row["range"] == "golden"][:2]
        write_labels(site.root / "labels.csv", [(row["sop_uid"], FINDINGS[0], n) for n, row in enumerate(chosen)])
        labels.import_csv(site, ledger, site.root / "labels.csv", "test")
        golden_set.freeze(site, ledger, "test")
        assert retention.step(site, ledger, NOW + 31 * DAY) == len(rows) - 2
        kept = [row["id"] for row in rows if has_original(site, row)]
        assert kept == [row["id"] for row in chosen]


def test_an_original_is_kept_until_the_pacs_has_its_results(tmp_path):
    site = make_retention_site(tmp_path / "site", results={"sr": True, "destination": "PACS@127.0.0.1:1"})
    with site.ledger() as ledger:
        scored_rows(site, ledger, 1)
        assert ledger.value("SELECT state FROM outbox") == "waiting"
        assert retention.step(site, ledger, NOW + 31 * DAY) == 0
        with ledger.transaction():
            ledger.run("UPDATE outbox SET state = 'sent', sent_at = ?", utc())
        assert retention.step(site, ledger, NOW + 31 * DAY) == 0  # checked again once a day
        assert retention.step(site, ledger, NOW + 33 * DAY) == 1


def test_a_rejected_or_quarantined_file_is_dropped_after_its_days_and_its_reason_stays(site):
    site.inbox.put(b"not DICOM at all")
    put(site, xray(1, view="LL"))
    with site.ledger() as ledger:
        take_in(site, ledger)
        rows = ledger.rows("SELECT * FROM image")
        assert retention.step(site, ledger, NOW + 9 * DAY) == 0
        assert retention.step(site, ledger, NOW + 11 * DAY) == 2
        assert not any(has_original(site, row) for row in rows)
        assert {row["state"] for row in rows} == {"rejected", "quarantined"}
        after = ledger.rows("SELECT reason, sha256 FROM image")
        assert after == [{"reason": row["reason"], "sha256": row["sha256"]} for row in rows]


def test_a_tick_drops_a_bounded_number_and_the_next_tick_continues(site, monkeypatch):
    monkeypatch.setattr(retention, "BATCH", 3)
    with site.ledger() as ledger:
        scored_rows(site, ledger, *range(1, 8))
        assert [retention.step(site, ledger, NOW + 31 * DAY) for _ in range(4)] == [3, 3, 1, 0]


def test_no_step_reads_images_that_are_not_due(site):
    with site.ledger() as ledger:
        for sql in (
            "SELECT image FROM kept_file WHERE kind = 'original' AND since < '2026' ORDER BY since LIMIT 3",
            "SELECT image, original FROM kept_file JOIN image ON image.id = kept_file.image WHERE kind = 'dropping'",
        ):
            plan = " ".join(row["detail"] for row in ledger.rows(f"EXPLAIN QUERY PLAN {sql}"))
            assert "kept_file_since" in plan
            assert "SCAN" not in plan and "TEMP B-TREE" not in plan


def test_the_agents_housekeeping_drops_due_originals(site):
    with site.ledger() as ledger:
        (row,) = scored_rows(site, ledger, 1)
    assert housekeeping(site, NOW + 31 * DAY) == "done"
    assert not has_original(site, row)


def drop_until(root, k):
    site = Site.open(root / "appliance.toml")
    with site.ledger() as ledger:
        count_steps(k)
        retention.step(site, ledger, NOW + 31 * DAY)


def recover(root):
    site = Site.open(root / "appliance.toml")
    with site.ledger() as ledger:
        retention.step(site, ledger, NOW + 31 * DAY)


def test_after_a_crash_at_any_step_no_row_lacks_its_file_and_the_next_tick_finishes(tmp_path):
    base = make_retention_site(tmp_path / "base")
    with base.ledger() as ledger:
        scored_rows(base, ledger, 1, 2)
        base.inbox.put(b"not DICOM")
        take_in(base, ledger)
    for k in range(1, 30):
        root = tmp_path / f"k{k}"
        shutil.copytree(base.root, root)
        code = in_child(drop_until, root, k)
        site = Site.open(root / "appliance.toml")
        with site.ledger() as ledger:
            assert all(has_original(site, row) for row in ledger.rows("SELECT * FROM image WHERE dropped_at IS NULL"))
        assert in_child(recover, root) == 0
        with site.ledger() as ledger:
            assert [has_original(site, row) for row in ledger.rows("SELECT * FROM image")] == [False] * 3
            assert ledger.value("SELECT count(*) FROM kept_file") == 0
            assert ledger.counters()["dropped"] == 3
        if code == 0:
            break
        assert code == DIED
    assert k > 6  # two intents, three unlinks, two confirmations


def test_an_image_that_is_received_again_is_kept_again_for_its_full_time(site):
    with site.ledger() as ledger:
        (row,) = scored_rows(site, ledger, 1)
        retention.step(site, ledger, NOW + 31 * DAY)
        put(site, xray(1))
        take_in(site, ledger)
        assert ledger.value("SELECT count(*) FROM image") == 1
        assert has_original(site, row)
        assert ledger.value("SELECT dropped_at FROM image") is None
        assert retention.step(site, ledger, NOW + 29 * DAY) == 0
        assert retention.step(site, ledger, NOW + 31 * DAY) == 1


def test_an_image_that_is_received_again_between_intent_and_removal_stays(site):
    with site.ledger() as ledger:
        (row,) = scored_rows(site, ledger, 1)
        retention.mark_due(ledger, "original", NOW + 31 * DAY, 30 * DAY)
        put(site, xray(1))
        take_in(site, ledger)
        assert retention.finish(site, ledger) == 0
        assert has_original(site, row)


def test_storage_commitment_fails_after_the_original_is_dropped(site):
    with site.ledger() as ledger:
        (row,) = scored_rows(site, ledger, 1)
        reference = (DIGITAL_XRAY_PRESENTATION, row["sop_uid"])
        assert commitment_check.check(site, [reference]) == [0]
        retention.step(site, ledger, NOW + 31 * DAY)
        assert commitment_check.check(site, [reference]) == [NO_SUCH_INSTANCE]


def test_explain_needs_only_the_plate_and_the_original_is_reported_as_dropped(site, tmp_path):
    with site.ledger() as ledger:
        (row,) = scored_rows(site, ledger, 1)
        retention.step(site, ledger, NOW + 31 * DAY)
        after = ledger.rows("SELECT * FROM image")[0]
        explained = explain.explain(site, ledger, row["sop_uid"], None, "heatmap", None, tmp_path / "map.png")
        assert 0 <= explained["probability"] <= 1
        with pytest.raises(Problem, match="original was dropped on"):
            original_path(site, ImageRecord.from_row(after))


def test_in_an_older_ledger_retention_counts_from_the_first_score(tmp_path):
    path = tmp_path / "ledger.db"
    connection = sqlite3.connect(path, isolation_level=None)
    schema.migrations.apply(Database(connection), stop_before="retention_and_forget")
    insert = (
        "INSERT INTO image (id, sha256, state, received_at, stored_at, original, plate) VALUES (?, ?, ?, ?, ?, ?, ?)"
    )
    connection.execute(insert, (1, "a", "stored", "2026-01-01", "2026-01-01", "originals/a", "plates/a"))
    connection.execute(insert, (2, "b", "rejected", "2026-01-02", "2026-01-02", "aside/b", None))
    connection.execute(insert, (3, "c", "stored", "2026-01-03", "2026-01-03", "originals/c", "plates/c"))
    connection.execute("INSERT INTO prediction VALUES (1, 1, 'x', '{}', '2026-02-01'), (2, 1, 'y', '{}', '2026-03-01')")
    connection.close()
    with Ledger(path) as ledger:
        assert [tuple(row.values()) for row in ledger.rows("SELECT * FROM kept_file ORDER BY image")] == [
            (1, "original", "2026-02-01"),
            (2, "aside", "2026-01-02"),
        ]
