"""Time of `forget`, `images ls` and `status` on a ledger of a million images.

The rows are synthetic and written straight into SQLite, in an order that its triggers accept. Only the images of the
forgotten patients have files, so the search for orphans in a full store is not in these times. The bench forgets three
patients, with 1, 10 and 100 images.

    python bench/privacy/forget.py [--images 1000000] [--store FOLDER] [--out bench/results/forget.json]
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from agent.erasure import forget
from agent.images import listing
from agent.ledger.database import Ledger
from agent.service.status import status
from agent.site import config
from agent.site.site import Site, init
from bench.common import machine, results
from bench.common.appliance import ROOT

BUNDLE, FINDINGS = "b0001", ("cardiomegaly", "effusion", "opacity")
SCORES = json.dumps(dict.fromkeys(FINDINGS, 0.123456))
AT = "2025-06-01T08:00:00.000Z"
PATIENTS = {"ONE": 1, "TEN": 10, "HUNDRED": 100}
LABELLED, ASIDE, GOLDEN = 20, 50, 100  # one image in so many
REPEATS = 9  # of each command that only reads
BLOCK = 50_000  # rows in one transaction


def digest(text: str) -> str:
    """Return the sha256 in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def image_rows(site: Site, count: int) -> Iterator[tuple[Any, ...]]:
    """Yield image rows in order: three named patients at random places, all other patients with two images."""
    owners = [name for name, many in PATIENTS.items() for _ in range(many)]
    known = dict(zip(random.Random(0).sample(range(1, count + 1), len(owners)), owners, strict=True))
    keys = {name: forget.pseudonyms_of(site, name, ())[0] for name in PATIENTS}
    for n in range(1, count + 1):
        sha, mine = digest(str(n)), n in known
        key = keys[known[n]] if mine else "p" + digest(f"patient {n // 2}")[:16]
        aside = n % ASIDE == 0 and not mine
        part = "aside" if aside else "originals"
        if mine:
            for place in (f"originals/{sha[:2]}/{sha}.dcm", f"plates/{sha[:2]}/{sha}.npy"):
                path = site.store.path(place)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"an image")
        yield (
            n, sha, "rejected" if aside else "stored", "view" if aside else None, f"1.2.826.0.1.{n}", f"1.2.840.{n // 2}",
            key, "train", "PA", AT, AT, "CR", sha, None if aside else f"plates/{sha[:2]}/{sha}.npy", 1,
            f"{part}/{sha[:2]}/{sha}.dcm",
        )  # fmt: skip


IMAGE = (
    "INSERT INTO image (id, sha256, state, reason, sop_uid, study_uid, patient_key, range, view, received_at, stored_at, "
    "scanner, pixel_sha256, plate, plate_version, original) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
REST = (  # for the images from ? to ?: the rows that a year of service adds to each
    "INSERT INTO receipt SELECT 'f' || sha256, id, state, stored_at FROM image WHERE id BETWEEN ? AND ?",
    f"INSERT INTO prediction (image, bundle, probabilities, at) SELECT id, '{BUNDLE}', '{SCORES}', stored_at FROM image "
    "WHERE id BETWEEN ? AND ? AND plate IS NOT NULL",
    "INSERT INTO outbox (image, bundle, kind, state, due, at, sent_at) SELECT id, 'b0001', kind, 'sent', stored_at, "
    "stored_at, stored_at FROM image, (SELECT 'sr' AS kind UNION SELECT 'sc') WHERE id BETWEEN ? AND ? AND plate IS NOT NULL",
    "INSERT INTO label (image, finding, value, source, by, at) SELECT id, 'opacity', id % 2, 'report', 'bench', stored_at "
    f"FROM image WHERE id BETWEEN ? AND ? AND plate IS NOT NULL AND id % {LABELLED} = 1",
    f"INSERT INTO golden_image SELECT 1, id, 'opacity', id % 2 FROM image WHERE id BETWEEN ? AND ? AND id % {GOLDEN} = 1",
    "INSERT OR IGNORE INTO pulled SELECT 'ARCHIVE', study_uid, 'CR', 1, 1, stored_at FROM image WHERE id BETWEEN ? AND ?",
)


def fill(site: Site, ledger: Ledger, count: int) -> None:
    """Fill the ledger of a site that stored, scored and answered `count` images."""
    with ledger.transaction():
        ledger.insert("golden_set", version=1, sha256=digest("golden"), by="bench", at=AT)
    rows = image_rows(site, count)
    for first in range(1, count + 1, BLOCK):
        with ledger.transaction():
            ledger.db.executemany(IMAGE, (row for row, _ in zip(rows, range(BLOCK), strict=False)))
            for sql in REST:
                ledger.run(sql, first, first + BLOCK - 1)
        print(f"{min(first + BLOCK - 1, count)} images", file=sys.stderr, flush=True)
    ledger.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def timed(work: Callable[[], object], repeats: int) -> list[float]:
    """Return the seconds of each repetition."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return seconds


def measured(site: Site, ledger: Ledger) -> list[dict[str, Any]]:
    """Return one row for each command, with its times."""
    reading: dict[str, Callable[[], object]] = {
        "status": lambda: status(site, ledger),
        "images ls": lambda: listing.newest(site, ledger, None, 50),
        "images ls --state rejected": lambda: listing.newest(site, ledger, "rejected", 50),
        "images ls --state quarantined (none)": lambda: listing.newest(site, ledger, "quarantined", 50),
    }
    for name, many in PATIENTS.items():
        keys = forget.pseudonyms_of(site, name, ())
        reading[f"forget --dry-run, {many} images"] = lambda keys=keys: forget.preview(site, ledger, keys)
    rows = []
    for what, work in reading.items():
        seconds = timed(work, REPEATS)
        rows.append({"what": what, "median_s": median(seconds), "most_s": max(seconds)})
    vacuum = timed(lambda: ledger.db.execute("VACUUM"), 2)
    ledger.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    rows.append({"what": "of each forget: VACUUM", "median_s": median(vacuum), "most_s": max(vacuum)})
    for name, many in PATIENTS.items():
        keys = forget.pseudonyms_of(site, name, ())
        began = time.perf_counter()
        done = forget.forget(site, ledger, keys, "bench", "a bench", False)
        took = time.perf_counter() - began
        if (done["state"], done["images"]) != ("done", many):
            raise SystemExit(f"forget {name} failed: {done}")
        rows.append({"what": f"forget, {many} images", "median_s": took, "most_s": took})
    return rows


def main() -> None:
    """Fill a ledger, measure, print and write."""
    parser = results.parser(__doc__, "forget.json")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument(
        "--store", type=Path, help="a folder with 4 GB for a million images; default: beside this repository"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix=".forget-", dir=options.store or ROOT) as folder:
        site = init(Path(folder) / "site", config.checked({"site": {"findings": list(FINDINGS)}}))
        with site.ledger() as ledger:
            fill(site, ledger, options.images)
            size = (site.root / "ledger.db").stat().st_size
            rows = measured(site, ledger)
    print(f"{options.images} images, ledger of {size / 1e6:.0f} MB\n{'':40}median ms   most ms")
    for row in rows:
        print(f"{row['what']:40}{1e3 * row['median_s']:9.1f} {1e3 * row['most_s']:9.1f}")
    document = {"images": options.images, "ledger_mb": size / 1e6, "machine": machine.facts(), "rows": rows}
    results.write(options.out, document)


if __name__ == "__main__":
    main()
