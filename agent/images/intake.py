"""From a file to a row: examine in a worker, keep the file, write the row, remove the source.

Each step is idempotent and the row is the last durable one, so a crash anywhere means doing it again.
Knows nothing of the network, and nothing of models.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from agent.ledger.database import Ledger, Row, utc
from agent.site import locks
from agent.site.site import Site
from agent.site.splits import fix_shares, range_of
from cxrloop.plate import PLATE_VERSION
from dicom.dataset.facts import Examined, Image
from dicom.dataset.part10 import content_sha256
from dicom.intake.examine import Admission
from dicom.intake.examiner import UNREAD, Examiner
from dicom.pseudonyms import refusal

BATCH = 64  # files of one step: small enough to be scored soon, large enough to keep the worker busy
IDENTITY = ("study_uid", "patient_key", "view")  # a change in one of these is a corrected version


@contextmanager
def examiner(site: Site) -> Iterator[Examiner]:
    """The bounded decoding process, with the site's admission rules."""
    keys = site.config.admission
    rules = Admission(children=keys.children, min_side=keys.min_side, quality=keys.quality)
    memory = keys.decode_memory_mb << 20
    with Examiner(
        site.key("pseudonym.key"), rules, workers=1, timeout_s=keys.decode_seconds, memory_bytes=memory
    ) as pool:
        yield pool


def step(site: Site, ledger: Ledger, pool: Examiner) -> int:
    """Take in what waits in the inbox, at most BATCH files; how many were taken."""
    files = site.inbox.waiting(BATCH)
    if files:
        fix_shares(ledger, site.config.patients)
    taken = 0
    for path, examined in pool.examine(files):
        if not path.exists():  # forgotten meanwhile
            continue
        if examined.sha256 == UNREAD:
            _unread(ledger, path.name)
            continue
        received = utc(datetime.fromtimestamp(path.stat().st_mtime, UTC))
        take(site, ledger, path, examined, received, receipt=path.name)
        path.unlink(missing_ok=True)
        taken += 1
    return taken


def _unread(ledger: Ledger, name: str) -> None:
    """A file that the disk does not give out stays where it is, said once; those behind it are taken in."""
    detail = f"inbox/{name} can't be read and stays there; check the disk"
    if not ledger.value("SELECT 1 FROM notice WHERE detail = ?", detail):
        with ledger.transaction():
            _notice(ledger, "damaged", detail)


def take(
    site: Site,
    ledger: Ledger,
    path: Path,
    examined: Examined,
    received_at: str,
    receipt: str | None = None,
    file: str | None = None,
) -> str:
    """Keep one examined file and write its row; stored, rejected, quarantined or duplicate.

    `receipt` names an inbox file whose answer must stay the same when it is taken twice; `file` is the
    name by which labels may refer to an imported image.
    """
    if receipt and (done := ledger.value("SELECT outcome FROM receipt WHERE name = ?", receipt)):
        return done
    with locks.wait_for(site, "filing"):  # no image is forgotten or dropped between its files and its row
        return _file(site, ledger, path, examined, received_at, receipt, file)


def _file(
    site: Site, ledger: Ledger, path: Path, examined: Examined, received_at: str, receipt: str | None, file: str | None
) -> str:
    unwanted = refused(site, ledger, examined.patient_key)
    twin = _twin(ledger, examined)
    again = bool(twin and twin["dropped_at"] and twin["sha256"] == examined.sha256)
    kept = {} if unwanted or (twin and not again) else _keep(site, path, examined)
    mended = bool(twin and not unwanted and not again and _mend(site, path, examined, twin))
    with ledger.transaction():
        if unwanted:
            outcome, image_id = "rejected", None  # and not a word more
        elif twin:
            outcome, image_id = "duplicate", twin["id"]
            if file and not twin["file"]:
                ledger.run("UPDATE image SET file = ? WHERE id = ?", file, image_id)
            if again:  # retention dropped it, the sender has it once more: its time begins anew
                kind = "original" if twin["plate"] else "aside"
                ledger.run("UPDATE image SET dropped_at = NULL WHERE id = ?", image_id)
                ledger.run("INSERT OR REPLACE INTO kept_file VALUES (?, ?, ?)", image_id, kind, utc())
            if mended:
                _notice(ledger, "damaged", f"image {image_id}: its file was damaged; what came again replaced it")
        else:
            outcome = {"admitted": "stored"}.get(examined.outcome, examined.outcome)
            image_id = _insert(site, ledger, examined, outcome, kept, received_at, file)
        if receipt:
            ledger.insert("receipt", name=receipt, image=image_id, outcome=outcome, at=utc())
    return outcome


def _mend(site: Site, path: Path, examined: Examined, twin: Row) -> bool:
    """The bytes of an image came once more: they take the place of a stored file that is not what came first."""
    if twin["dropped_at"] or twin["sha256"] != examined.sha256:
        return False
    stored = site.store.path(twin["original"])
    if stored.exists() and content_sha256(stored) == twin["sha256"]:
        return False
    stored.unlink(missing_ok=True)
    keep = site.store.keep_original if twin["original"].startswith("originals/") else site.store.keep_aside
    keep(path, examined.sha256)
    return True


def refused(site: Site, ledger: Ledger, patient_key: str | None) -> bool:
    """Whether this patient was forgotten for good: `forget --and-refuse`."""
    if not patient_key or not ledger.value("SELECT 1 FROM refused_patient LIMIT 1"):
        return False
    hashed = refusal(site.key("pseudonym.key"), patient_key)
    return bool(ledger.value("SELECT 1 FROM refused_patient WHERE hash = ?", hashed))


def _twin(ledger: Ledger, examined: Examined) -> Row | None:
    """The row of the same content, or of the same image in another lossless syntax."""
    row = ledger.row("SELECT * FROM image WHERE sha256 = ?", examined.sha256)
    if row or not examined.image:
        return row
    image = examined.image
    # also among superseded ones: an old version in another syntax must not undo its own correction
    same = ledger.rows("SELECT * FROM image WHERE sop_uid = ? AND pixel_sha256 = ?", image.sop_uid, image.pixel_sha256)
    return next((row for row in same if all(row[key] == getattr(image, key) for key in IDENTITY)), None)


def _keep(site: Site, path: Path, examined: Examined) -> dict[str, str]:
    if examined.plate is None:
        return {"original": site.store.keep_aside(path, examined.sha256)}
    return {
        "original": site.store.keep_original(path, examined.sha256),
        "plate": site.store.keep_plate(examined.plate, examined.sha256),
    }


def _insert(
    site: Site, ledger: Ledger, examined: Examined, state: str, kept: dict[str, str], received_at: str, file: str | None
) -> int:
    others = (
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
        **kept,
        **(_facts(site, examined.image) if examined.image else {}),
    )
    for row in others:
        if row["superseded_by"]:
            continue
        if examined.image and row["pixel_sha256"] == examined.image.pixel_sha256:
            ledger.run("UPDATE image SET superseded_by = ? WHERE id = ?", image_id, row["id"])
            _notice(ledger, "corrected", f"image {image_id} supersedes {row['id']}: same pixels, corrected header")
        else:
            _notice(
                ledger, "same UID", f"images {row['id']} and {image_id}: one SOP Instance UID, other pixels; both kept"
            )
    return image_id


def _facts(site: Site, image: Image) -> dict[str, object]:
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
