"""The pool of unlabelled images: which of all images of the train range a round learns from.

Each image gets one row with a keyed random number and a code that finds near-duplicates, at constant cost (`step`).
`draw` then takes a random sample without replacement, weighted by age, with limits for patients and devices. The same site
draws the same sample again; a sender, who has no key, can't predict it. Must not import `agent.rounds`.
"""

import hmac
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from agent.ledger.database import Ledger, Row, utc
from agent.site.site import Site

BATCH = 256  # images of one tick: 1.4 million a day, and a tick of a second at most
CANDIDATES = 32  # images compared for each band, the newest first: bounds the cost of an image
USABLE = "plate IS NOT NULL AND heartbeat = 0 AND superseded_by IS NULL"
UNKNOWN_DEVICE = "unknown"


@dataclass(frozen=True)
class Entry:
    """An image that can be drawn: `order` is higher for an image that is drawn earlier."""

    image: int
    patient: str
    device: str
    order: float


# Upkeep: one row for each image


def step(site: Site, ledger: Ledger) -> int:
    """Give at most BATCH waiting images their row; return how many waited. Can be repeated at any moment."""
    waiting = ledger.rows(
        "SELECT image.id, image.sha256, image.plate FROM pool_waiting JOIN image ON image.id = pool_waiting.image "
        "ORDER BY pool_waiting.image LIMIT ?",
        BATCH,
    )
    if not waiting:
        return 0
    key = site.key("pseudonym.key")
    codes = {row["id"]: _code(site, row, key) for row in waiting}
    with ledger.transaction():
        for row in waiting:
            if ledger.value("SELECT 1 FROM pool_waiting WHERE image = ?", row["id"]):  # not done by another process
                _add(ledger, row, codes[row["id"]], key)
    return len(waiting)


def _code(site: Site, row: Row, key: bytes) -> bytes | None:
    """Return the code of an image's plate; None where the plate is lost or damaged, which the learner then reports."""
    from dicom.pixels import near_duplicate  # here: most commands read no plate

    try:
        return near_duplicate.code(site.store.plate(row["plate"]), key)
    except (OSError, ValueError, EOFError):
        return None


def _add(ledger: Ledger, row: Row, code: bytes | None, key: bytes) -> None:
    from dicom.pixels import near_duplicate

    image, bands = row["id"], near_duplicate.bands(code) if code else []
    copy_of = _near_duplicate(ledger, code, bands) if code else None
    ledger.insert("pool_image", image=image, draw=random_number(key, row["sha256"]), code=code, copy_of=copy_of)
    for band in bands if copy_of is None else ():
        ledger.insert("pool_band", band=band, image=image)
    ledger.run("DELETE FROM pool_waiting WHERE image = ?", image)


def _near_duplicate(ledger: Ledger, code: bytes, bands: list[int]) -> int | None:
    """Return an earlier image whose code is near, or None."""
    from dicom.pixels import near_duplicate

    sql = (
        "SELECT pool_image.image, code FROM pool_band JOIN pool_image ON pool_image.image = pool_band.image "
        "WHERE band = ? ORDER BY pool_band.image DESC LIMIT ?"
    )
    for band in bands:
        for row in ledger.rows(sql, band, CANDIDATES):
            if near_duplicate.distance(code, row["code"]) <= near_duplicate.LIMIT:
                return row["image"]
    return None


def random_number(key: bytes, sha256: str) -> float:
    """Return the random number of an image in (0, 1): a keyed hash of its content, so it never changes."""
    digest = hmac.digest(key, b"pool" + sha256.encode(), "sha256")
    return (int.from_bytes(digest[:6]) + 0.5) / 2**48


# The draw


def draw(site: Site, ledger: Ledger, now: datetime, labelled: Mapping[str, int]) -> dict[int, str]:
    """Return the pool of a round by image, with the reason why each is in; `labelled`: labelled images of each patient.

    Labelled images are in every round, so they are not drawn; they count for their patient.
    """
    while step(site, ledger):
        pass
    learn = site.config.learn
    entries = _entries(ledger, now, learn.pool_half_life_days)
    return choose(entries, learn.max_unlabelled, learn.pool_per_patient, learn.pool_device_share, labelled)


def _entries(ledger: Ledger, now: datetime, half_life_days: int) -> list[Entry]:
    """Return all images that can be drawn, the first to be drawn first.

    Ordering by Gumbel noise plus log weight draws without replacement with these weights (Efraimidis and Spirakis 2006,
    in the form of Kool et al. 2019). The weight halves with each half-life.
    """
    rows = ledger.rows(
        "SELECT image.id, patient_key, scanner, draw, julianday(?) - julianday(received_at) AS days FROM pool_image "
        f"JOIN image ON image.id = pool_image.image WHERE copy_of IS NULL AND {USABLE} "
        "AND image.id NOT IN (SELECT image FROM label)",
        utc(now),
    )
    noise = -np.log(-np.log(np.array([row["draw"] for row in rows], float)))
    days = np.array([row["days"] for row in rows], float)
    order = noise - np.log(2) * days / half_life_days if half_life_days else noise
    entries = [
        Entry(row["id"], row["patient_key"], row["scanner"] or UNKNOWN_DEVICE, float(place))
        for row, place in zip(rows, order, strict=True)
    ]
    return sorted(entries, key=lambda entry: -entry.order)


def choose(
    entries: Iterable[Entry], size: int, per_patient: int, device_share: float, labelled: Mapping[str, int]
) -> dict[int, str]:
    """Return at most `size` images with the reason of each, from entries in the order in which they are drawn.

    At most `per_patient` images a patient, those in `labelled` included. A device beyond `device_share` of `size` gets
    only the places that the others leave free.
    """
    chosen: dict[int, str] = {}
    beyond: list[Entry] = []
    patients, devices = Counter(labelled), Counter[str]()

    def take(entry: Entry, why: str) -> None:
        if patients[entry.patient] < per_patient and len(chosen) < size:
            chosen[entry.image] = why
            patients[entry.patient] += 1
            devices[entry.device] += 1

    for entry in entries:
        if devices[entry.device] + 1 > device_share * size:
            beyond.append(entry)
        else:
            take(entry, f"pool: device {entry.device}")
    for entry in beyond:
        take(entry, f"pool: device {entry.device}, in a place that other devices left free")
    return chosen
