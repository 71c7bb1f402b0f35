"""Retention: originals go so many days after their score, set-aside files so many days after they came; rows stay.

Plates, scores, labels and hashes are kept. An intent row (`kept_file.kind = 'dropping'`, and `dropped_at` on the image),
the unlink, then the intent row goes: a crash anywhere is finished by the next tick. Never looks at an image that isn't due.
"""

from datetime import datetime, timedelta
from pathlib import Path

from agent.ledger.database import Ledger, utc
from agent.site import locks
from agent.site.site import Site
from cxrloop.durable import sync_folder

BATCH = 256  # files of one tick: 1.4 million a day, and a tick of a second at most
AGAIN = timedelta(days=1)  # before an image that is due but may not go yet is looked at again


def step(site: Site, ledger: Ledger, now: datetime) -> int:
    """Drop at most BATCH files of each kind that are due, after finishing what a crash left; how many went."""
    went, keys = finish(site, ledger), site.config.retention
    for kind, days in (("original", keys.originals_days), ("aside", keys.aside_days)):
        if days and intend(ledger, kind, now, timedelta(days=days)):
            went += finish(site, ledger)
    return went


def intend(ledger: Ledger, kind: str, now: datetime, keep: timedelta) -> int:
    """Write the intent to drop the files of a kind that are older than `keep`; how many are to go."""
    due = "SELECT image FROM kept_file WHERE kind = ? AND since < ? ORDER BY since LIMIT ?"
    if not ledger.value(due, kind, utc(now - keep), 1):
        return 0  # most ticks: no write lock is taken
    count = 0
    with ledger.transaction():
        for row in ledger.rows(due, kind, utc(now - keep), BATCH):
            image = row["image"]
            if kind == "original" and in_golden_set(ledger, image):
                ledger.run("DELETE FROM kept_file WHERE image = ?", image)  # kept for good
            elif kind == "original" and outstanding(ledger, image):
                ledger.run("UPDATE kept_file SET since = ? WHERE image = ?", utc(now - keep + AGAIN), image)
            else:
                ledger.run("UPDATE kept_file SET kind = 'dropping' WHERE image = ?", image)
                ledger.run("UPDATE image SET dropped_at = ? WHERE id = ?", utc(now), image)
                count += 1
    return count


def finish(site: Site, ledger: Ledger) -> int:
    """Unlink what is meant to go, and confirm it; how many. Harmless to repeat."""
    meant = "SELECT image, original FROM kept_file JOIN image ON image.id = kept_file.image WHERE kind = 'dropping'"
    if not ledger.value(meant):
        return 0
    with locks.wait_for(
        site, "filing"
    ):  # an image that comes in again meanwhile is kept either before this or after it
        rows = ledger.rows(meant)
        unlink(site, [row["original"] for row in rows])
        with ledger.transaction():
            for row in rows:
                ledger.run("DELETE FROM kept_file WHERE image = ?", row["image"])
            ledger.run("UPDATE counter SET n = n + ? WHERE name = 'dropped'", len(rows))
    return len(rows)


def unlink(site: Site, places: list[str]) -> None:
    """Remove files of the store, durably; one that is gone already is no error."""
    folders: set[Path] = set()
    for place in places:
        path = site.store.path(place)
        path.unlink(missing_ok=True)
        folders.add(path.parent)
    for folder in folders:
        if folder.exists():
            sync_folder(folder)


def in_golden_set(ledger: Ledger, image: int) -> bool:
    """Whether an image is in any frozen golden set: those keep their original, so that plates can be made anew."""
    # by version first: that is the order of the key
    sql = "SELECT 1 FROM golden_image WHERE version IN (SELECT version FROM golden_set) AND image = ? LIMIT 1"
    return bool(ledger.value(sql, image))


def outstanding(ledger: Ledger, image: int) -> bool:
    """Whether an answer about this image still waits for the PACS: it is made with the original's header.

    One that the PACS refused for good does not hold a file back; `studies rerun` then says what is missing.
    """
    return bool(ledger.value("SELECT 1 FROM outbox WHERE image = ? AND state = 'waiting' LIMIT 1", image))
