"""Retention: remove originals some days after their first score, and rejected or quarantined files after some days.

Rows, plates, scores, labels and hashes stay. First an intent is written (`kept_file.kind = 'dropping'` and
`image.dropped_at`), then the file is removed, then the intent: after a crash anywhere the next tick finishes. A tick
reads only what is due.
"""

from datetime import datetime, timedelta
from pathlib import Path

from agent.ledger.database import Ledger, utc
from agent.site import locks
from agent.site.site import Site
from cxrloop.durable import sync_folder

BATCH = 256  # files of one tick: 1.4 million a day, and a tick of a second at most
RECHECK = timedelta(days=1)  # an original that is due but still needed is checked again after this time


def step(site: Site, ledger: Ledger, now: datetime) -> int:
    """Finish what a crash left, then drop at most BATCH due files of each kind; return how many files were removed."""
    removed, keys = finish(site, ledger), site.config.retention
    for kind, days in (("original", keys.originals_days), ("aside", keys.aside_days)):
        if days and mark_due(ledger, kind, now, timedelta(days=days)):
            removed += finish(site, ledger)
    return removed


def mark_due(ledger: Ledger, kind: str, now: datetime, keep: timedelta) -> int:
    """Write the intent to drop the files of a kind that are older than `keep`; return how many were marked."""
    due = "SELECT image FROM kept_file WHERE kind = ? AND since < ? ORDER BY since LIMIT ?"
    if not ledger.value(due, kind, utc(now - keep), 1):
        return 0  # most ticks: no write lock is taken
    count = 0
    with ledger.transaction():
        for row in ledger.rows(due, kind, utc(now - keep), BATCH):
            image = row["image"]
            if kind == "original" and in_golden_set(ledger, image):
                ledger.run("DELETE FROM kept_file WHERE image = ?", image)  # kept for good
            elif kind == "original" and has_waiting_results(ledger, image):
                ledger.run("UPDATE kept_file SET since = ? WHERE image = ?", utc(now - keep + RECHECK), image)
            else:
                ledger.run("UPDATE kept_file SET kind = 'dropping' WHERE image = ?", image)
                ledger.run("UPDATE image SET dropped_at = ? WHERE id = ?", utc(now), image)
                count += 1
    return count


def finish(site: Site, ledger: Ledger) -> int:
    """Remove all marked files and confirm it in the ledger; return how many. Can be repeated."""
    marked = "SELECT image, original FROM kept_file JOIN image ON image.id = kept_file.image WHERE kind = 'dropping'"
    if not ledger.value(marked):
        return 0
    with locks.wait_for(site, "filing"):  # an image that is received again is kept before this, or after it
        rows = ledger.rows(marked)
        remove_files(site, [row["original"] for row in rows])
        with ledger.transaction():
            for row in rows:
                ledger.run("DELETE FROM kept_file WHERE image = ?", row["image"])
            ledger.run("UPDATE counter SET n = n + ? WHERE name = 'dropped'", len(rows))
    return len(rows)


def remove_files(site: Site, places: list[str]) -> None:
    """Remove files of the store durably; a missing file is no error."""
    folders: set[Path] = set()
    for place in places:
        path = site.store.path(place)
        path.unlink(missing_ok=True)
        folders.add(path.parent)
    for folder in folders:
        if folder.exists():
            sync_folder(folder)


def in_golden_set(ledger: Ledger, image: int) -> bool:
    """Return True for an image of any frozen golden set: its original is kept, so that its plate can be made again."""
    # version first: the key of the table starts with it
    sql = "SELECT 1 FROM golden_image WHERE version IN (SELECT version FROM golden_set) AND image = ? LIMIT 1"
    return bool(ledger.value(sql, image))


def has_waiting_results(ledger: Ledger, image: int) -> bool:
    """Return True while a result of this image waits for the PACS: a result is made with the original's header.

    A result that the PACS refused for good does not keep the original; `images rerun` then reports what is missing.
    """
    return bool(ledger.value("SELECT 1 FROM outbox WHERE image = ? AND state = 'waiting' LIMIT 1", image))
