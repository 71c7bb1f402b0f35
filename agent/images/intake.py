"""From a received file to its row in the ledger: examine the file, keep it in the store, write the row, delete it.

Each step can be repeated, and the row is the last durable step: after a crash anywhere the file is taken in again.
Must not import `agent.network`, `agent.results` or `agent.rounds`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from agent.images.records import ImageRecord
from agent.ledger.database import Ledger, utc
from agent.site import locks
from agent.site.site import Site
from agent.site.splits import fix_shares, range_of
from cxrloop.plate import PLATE_VERSION
from dicom.dataset.facts import Examined, Image
from dicom.dataset.part10 import content_sha256
from dicom.intake.examine import Admission
from dicom.intake.examiner import UNREAD, Examiner
from dicom.pseudonyms import refusal

BATCH = 64  # files of one step: few enough to be scored soon, enough to keep the worker busy
IDENTITY = ("study_uid", "patient_key", "view")  # a change in one of these is a corrected version


@contextmanager
def examiner(site: Site) -> Iterator[Examiner]:
    """Start the bounded decoding process with the site's admission rules."""
    keys = site.config.admission
    rules = Admission(children=keys.children, min_side=keys.min_side, quality=keys.quality)
    memory = keys.decode_memory_mb << 20
    with Examiner(
        site.key("pseudonym.key"), rules, workers=1, timeout_s=keys.decode_seconds, memory_bytes=memory
    ) as pool:
        yield pool


def step(site: Site, ledger: Ledger, pool: Examiner) -> int:
    """Take in at most BATCH files from the inbox; return how many."""
    files = site.inbox.waiting(BATCH)
    if files:
        fix_shares(ledger, site.config.patients)
    count = 0
    for path, examined in pool.examine(files):
        if not path.exists():  # removed by `forget` in the meantime
            continue
        if examined.sha256 == UNREAD:
            _report_unreadable(ledger, path.name)
            continue
        received = utc(datetime.fromtimestamp(path.stat().st_mtime, UTC))
        take_in(site, ledger, path, examined, received, receipt=path.name)
        path.unlink(missing_ok=True)
        count += 1
    return count


def _report_unreadable(ledger: Ledger, name: str) -> None:
    """Write one notice about an inbox file that the disk can't read; the file stays, later files are taken in."""
    detail = f"inbox/{name} can't be read and stays there; check the disk"
    if not ledger.value("SELECT 1 FROM notice WHERE detail = ?", detail):
        with ledger.transaction():
            _notice(ledger, "damaged", detail)


def take_in(
    site: Site,
    ledger: Ledger,
    path: Path,
    examined: Examined,
    received_at: str,
    receipt: str | None = None,
    file: str | None = None,
) -> str:
    """Keep one examined file and write its row; return "stored", "rejected", "quarantined" or "duplicate".

    `receipt` is the name of the inbox file: a file that is taken in twice has the same outcome twice. `file` is the
    name under which labels may refer to an imported image.
    """
    if receipt and (outcome := ledger.value("SELECT outcome FROM receipt WHERE name = ?", receipt)):
        return outcome
    with locks.wait_for(site, "filing"):  # no image is forgotten or dropped between its files and its row
        return _take_in(site, ledger, path, examined, received_at, receipt, file)


def _take_in(
    site: Site, ledger: Ledger, path: Path, examined: Examined, received_at: str, receipt: str | None, file: str | None
) -> str:
    refused = is_refused(site, ledger, examined.patient_key)
    known = _known_image(ledger, examined)
    dropped = bool(known and known.dropped_at and known.sha256 == examined.sha256)
    places = {} if refused or (known and not dropped) else _keep_files(site, path, examined)
    repaired = bool(known and not refused and not dropped and _repair(site, path, examined, known))
    with ledger.transaction():
        if refused:
            outcome, image_id = "rejected", None  # the ledger must hold nothing of this patient
        elif known:
            outcome, image_id = "duplicate", known.id
            if file and not known.file:
                ledger.run("UPDATE image SET file = ? WHERE id = ?", file, image_id)
            if dropped:  # retention removed the original and the sender sent it again: its retention time restarts
                kind = "original" if known.plate else "aside"
                ledger.run("UPDATE image SET dropped_at = NULL WHERE id = ?", image_id)
                ledger.run("INSERT OR REPLACE INTO kept_file VALUES (?, ?, ?)", image_id, kind, utc())
            if repaired:
                _notice(ledger, "damaged", f"image {image_id}: its file was damaged; the copy sent again replaced it")
        else:
            outcome = {"admitted": "stored"}.get(examined.outcome, examined.outcome)
            image_id = _insert(site, ledger, examined, outcome, places, received_at, file)
        if receipt:
            ledger.insert("receipt", name=receipt, image=image_id, outcome=outcome, at=utc())
    return outcome


def _repair(site: Site, path: Path, examined: Examined, known: ImageRecord) -> bool:
    """Replace a stored file that is missing or damaged by the same content sent again; return whether it was."""
    if known.dropped_at or known.sha256 != examined.sha256:
        return False
    stored = site.store.path(known.original)
    if stored.exists() and content_sha256(stored) == known.sha256:
        return False
    stored.unlink(missing_ok=True)
    keep = site.store.keep_original if known.original.startswith("originals/") else site.store.keep_aside
    keep(path, examined.sha256)
    return True


def is_refused(site: Site, ledger: Ledger, patient_key: str | None) -> bool:
    """Return True for a patient whose images `forget --and-refuse` excluded."""
    if not patient_key or not ledger.value("SELECT 1 FROM refused_patient LIMIT 1"):
        return False
    hashed = refusal(site.key("pseudonym.key"), patient_key)
    return bool(ledger.value("SELECT 1 FROM refused_patient WHERE hash = ?", hashed))


def _known_image(ledger: Ledger, examined: Examined) -> ImageRecord | None:
    """Return the image with the same content, or the same image in another lossless transfer syntax."""
    row = ledger.row("SELECT * FROM image WHERE sha256 = ?", examined.sha256)
    if row or not examined.image:
        return ImageRecord.from_row(row) if row else None
    image = examined.image
    # superseded images too: an old version in another syntax must not undo its own correction
    sql = "SELECT * FROM image WHERE sop_uid = ? AND pixel_sha256 = ?"
    versions = map(ImageRecord.from_row, ledger.rows(sql, image.sop_uid, image.pixel_sha256))
    return next((v for v in versions if all(getattr(v, name) == getattr(image, name) for name in IDENTITY)), None)


def _keep_files(site: Site, path: Path, examined: Examined) -> dict[str, str]:
    """Keep original and plate in the store, or a rejected or quarantined file; return their places by column."""
    if examined.plate is None:
        return {"original": site.store.keep_aside(path, examined.sha256)}
    return {
        "original": site.store.keep_original(path, examined.sha256),
        "plate": site.store.keep_plate(examined.plate, examined.sha256),
    }


def _insert(
    site: Site, ledger: Ledger, examined: Examined, state: str, places: dict[str, str], received_at: str,
    file: str | None,
) -> int:  # fmt: skip
    """Insert the row of a new image, mark the versions that it supersedes, and return its id."""
    same_uid = (
        ledger.rows("SELECT * FROM image WHERE sop_uid = ? AND plate IS NOT NULL", examined.sop_uid)
        if examined.image
        else []
    )
    image_id = ledger.insert(
        "image",
        sha256=examined.sha256,
        state=state,
        reason=examined.reason,
        sop_uid=examined.sop_uid,
        study_uid=examined.study_uid,
        patient_key=examined.patient_key,
        view=examined.view,
        received_at=received_at,
        stored_at=utc(),
        file=file,
        **places,
        **(_facts(site, examined.image) if examined.image else {}),
    )
    for row in same_uid:
        if row["superseded_by"]:
            continue
        if examined.image and row["pixel_sha256"] == examined.image.pixel_sha256:
            ledger.run("UPDATE image SET superseded_by = ? WHERE id = ?", image_id, row["id"])
            _notice(ledger, "corrected", f"image {image_id} supersedes {row['id']}: same pixels, corrected header")
        else:
            detail = f"images {row['id']} and {image_id}: same SOP Instance UID, different pixels; both are kept"
            _notice(ledger, "same UID", detail)
    return image_id


def _facts(site: Site, image: Image) -> dict[str, object]:
    """Return the columns that only an admitted image has."""
    key = site.key("pseudonym.key")
    return {
        "range": range_of(key, image.patient_key, image.identified, site.config.patients),
        "acquired_at": image.acquired_at,
        "sex": image.sex,
        "age_years": image.age_years,
        "scanner": image.scanner,
        "transfer_syntax": image.transfer_syntax,
        "pixel_sha256": image.pixel_sha256,
        "plate_version": PLATE_VERSION,
        "heartbeat": int(image.heartbeat),
    }


def _notice(ledger: Ledger, kind: str, detail: str) -> None:
    ledger.insert("notice", kind=kind, detail=detail, at=utc())
