"""`cxrloop forget`: remove every image of a patient, and everything on the site that leads back to the patient.

One transaction empties the rows (their numbers stay, for rounds and counts) and records what is still to be removed.
Then `finish` removes files, round folders and the database's free pages; every step can be repeated, and every tick
calls it. Trained models can't be undone; they are named. Audit and log must not identify the patient.
"""

import json
import re
import secrets
import sqlite3
from collections.abc import Collection, Iterable
from typing import Any

from agent.erasure import round_folders, site_files
from agent.errors import Problem
from agent.images.retention import remove_files
from agent.ledger import audit
from agent.ledger.database import Ledger, Row, canonical, utc
from agent.ledger.states import FORGOTTEN
from agent.site import locks
from agent.site.site import Site
from dicom.pseudonyms import PLACEHOLDERS, patient_key, refusal, study_mark

PSEUDONYM = re.compile(r"[ps][0-9a-f]{16}")
EMPTIED_COLUMNS = (  # of an image row: all that describes the image
    "sop_uid", "study_uid", "patient_key", "range", "view", "acquired_at", "sex", "age_years", "scanner",
    "transfer_syntax", "pixel_sha256", "plate", "plate_version", "file", "superseded_by", "returned_at",
)  # fmt: skip
LISTED_IMAGES = "SELECT image FROM forgetting"


def pseudonyms_of(site: Site, patient: str, issuers: Iterable[str]) -> list[str]:
    """Return the pseudonyms of a patient id without an issuer (IssuerOfPatientID) and with each of `issuers`."""
    if patient.strip().upper() in PLACEHOLDERS:
        raise Problem(
            "forget: this id is a placeholder and names no patient; name a pseudonym with --key "
            "(`cxrloop images ls --json` prints it)"
        )
    key = site.key("pseudonym.key")
    return [patient_key(key, patient, issuer, "")[0] for issuer in dict.fromkeys(("", *issuers))]


def checked_key(key: str) -> str:
    """Return a pseudonym as `images ls` prints it; raises Problem."""
    if not PSEUDONYM.fullmatch(key):
        raise Problem("--key: a pseudonym is p or s and 16 hex digits, as `cxrloop images ls --json` prints it")
    return key


def preview(site: Site, ledger: Ledger, keys: Collection[str]) -> dict[str, Any]:
    """Return what `forget` would remove (counts, golden versions) and affect (rounds, bundles). Changes nothing."""
    images = images_of(site, ledger, keys)
    waiting = len(site_files.incoming_files(site, keys))
    return {**_counts(ledger, images), "waiting": waiting, **round_folders.affected_models(site, ledger, images)}


def forget(site: Site, ledger: Ledger, keys: Collection[str], by: str, reason: str, refuse: bool) -> dict[str, Any]:
    """Forget the patient of these pseudonyms; with `refuse`, reject the patient's later images.

    Returns the counts of `preview`, with `state` "done", or "pending" and what it waits for. Raises Problem when the
    site holds nothing of the patient and `refuse` is off.
    """
    if not by.strip() or not reason.strip():
        raise Problem("forget: give --by and --reason; both are kept for good, so don't name the patient in them")
    finish(site, ledger)  # of a forget that was killed: its rows are emptied, and only its own record lists its files
    summary = preview(site, ledger, keys)
    if not (summary["images"] or summary["waiting"] or refuse):
        raise Problem(
            "forget: nothing of this patient is here; where images name an issuer of patient ids, give --issuer"
        )
    with locks.wait_for(site, "filing"), ledger.transaction():
        affected = {name: summary[name] for name in ("images", "golden", "rounds", "bundles")}
        number = ledger.insert(
            "forget", state="files", patient_keys=canonical(sorted(keys)), sop_uids="[]", by=by, reason=reason, at=utc()
        )
        after = {"forget": number, "refuse": refuse, **affected}
        audit.append(ledger, by, "patient to be forgotten", reason, after=after)
        _empty_rows(site, ledger, number, keys)
        for key in keys if refuse else ():
            hashed = refusal(site.key("pseudonym.key"), key)
            ledger.run("INSERT OR IGNORE INTO refused_patient VALUES (?, ?)", hashed, utc())
    pending = finish(site, ledger)
    later = "refused" if refuse else "taken in again"
    return {"state": "pending" if pending else "done", "pending": pending, **summary, "later_images": later}


def images_of(site: Site, ledger: Ledger, keys: Collection[str]) -> list[int]:
    """Return a patient's images: by pseudonym, the older versions they correct, and unreadable files with the id."""
    by_pseudonym = "SELECT id FROM image WHERE patient_key IN (SELECT value FROM json_each(?))"
    images = [row["id"] for row in ledger.rows(by_pseudonym, canonical(sorted(keys)))]
    older = "SELECT id FROM image WHERE sop_uid = (SELECT sop_uid FROM image WHERE id = ?) AND superseded_by = ?"
    for image in images:  # the list grows during the loop: corrections of corrections
        images += [row["id"] for row in ledger.rows(older, image, image) if row["id"] not in images]
    unreadable = (
        "SELECT id, original FROM image WHERE state = 'quarantined' AND patient_key IS NULL AND dropped_at IS NULL"
    )
    for row in ledger.rows(unreadable):
        if site_files.contains_patient_id(site.store.path(row["original"]), site.key("pseudonym.key"), keys):
            images.append(row["id"])
    return images


def _counts(ledger: Ledger, images: list[int]) -> dict[str, Any]:
    """Return how many files, scores, labels and golden images these images have."""
    numbers, listed = canonical(images), "IN (SELECT value FROM json_each(?))"

    def count(sql: str) -> int:
        return ledger.value(f"SELECT count(*) FROM {sql} {listed}", numbers)

    return {
        "images": len(images),
        "originals": count("image WHERE plate IS NOT NULL AND dropped_at IS NULL AND id"),
        "aside": count("image WHERE plate IS NULL AND dropped_at IS NULL AND id"),
        "predictions": count("prediction WHERE image"),
        "labels": count("label WHERE image"),
        "golden": ledger.rows(
            f"SELECT version, count(DISTINCT image) AS images FROM golden_image WHERE image {listed} GROUP BY version",
            numbers,
        ),
    }


def _empty_rows(site: Site, ledger: Ledger, number: int, keys: Collection[str]) -> None:
    """Empty the patient's rows and list their files in `forgetting`, within the caller's transaction."""
    images = images_of(site, ledger, keys)
    uids = set(json.loads(ledger.value("SELECT sop_uids FROM forget WHERE id = ?", number)))
    for image in images:
        row = ledger.rows("SELECT * FROM image WHERE id = ?", image)[0]
        ledger.insert("forgetting", image=image, forget=number, original=row["original"], plate=row["plate"])
        uids.add(row["sop_uid"] or "")
    ledger.run("UPDATE forget SET sop_uids = ? WHERE id = ?", canonical(sorted(uids)), number)
    lost = (
        "SELECT version, count(DISTINCT image) AS images FROM golden_image "
        f"WHERE image IN ({LISTED_IMAGES}) GROUP BY version"
    )
    for row in ledger.rows(lost):
        ledger.insert("golden_loss", **row, at=utc())
    for table in tables_with_images(ledger):
        ledger.run(f"DELETE FROM {table} WHERE image IN ({LISTED_IMAGES})")
    _forget_pulled_studies(site, ledger, images)
    emptied = ", ".join(f"{column} = NULL" for column in EMPTIED_COLUMNS)
    for image in images:
        now = utc()
        ledger.run(
            f"UPDATE image SET {emptied}, state = 'rejected', reason = ?, sha256 = ?, original = '', heartbeat = 0, "
            "received_at = ?, stored_at = ?, dropped_at = ? WHERE id = ?",
            FORGOTTEN, f"{FORGOTTEN} {secrets.token_hex(16)}", now, now, now, image,
        )  # fmt: skip


def tables_with_images(ledger: Ledger) -> list[str]:
    """Return every table with a column `image`, except `forgetting`, which lists what is to be removed."""
    tables = ledger.rows(
        "SELECT m.name FROM sqlite_master m JOIN pragma_table_info(m.name) c ON c.name = 'image' WHERE m.type = 'table'"
    )
    return [row["name"] for row in tables if row["name"] != "forgetting"]


def _forget_pulled_studies(site: Site, ledger: Ledger, images: list[int]) -> None:
    """Delete the marks of their studies as pulled, so that an image that an archive still has can come in again."""
    studies = "SELECT DISTINCT study_uid FROM image WHERE study_uid NOT NULL AND id IN (SELECT value FROM json_each(?))"
    for row in ledger.rows(studies, canonical(images)):
        ledger.run("DELETE FROM pulled WHERE study = ?", study_mark(site.key("pseudonym.key"), row["study_uid"]))


def finish(site: Site, ledger: Ledger) -> str | None:
    """Continue every unfinished `forget`; return None when none is left, else what it waits for.

    Can be repeated at any moment and in any number of processes.
    """
    unfinished = "SELECT * FROM forget WHERE state != 'done' ORDER BY id"
    if not ledger.value(unfinished):
        return None
    with locks.wait_for(site, "forget"):
        for row in ledger.rows(unfinished):
            if row["state"] == "files" and not _remove_everything(site, ledger, row):
                return "a round with one of the images is being planned, or its learner has not ended yet"
        if why := _wipe_free_pages(ledger):
            return why
        with ledger.transaction():
            ledger.run("UPDATE forget SET state = 'done', done_at = ? WHERE state = 'bytes'", utc())
    return None


def _remove_everything(site: Site, ledger: Ledger, forget_row: Row) -> bool:
    """Remove the patient's files, then the pseudonym itself; return False while a learner still uses some files."""
    number, keys = forget_row["id"], json.loads(forget_row["patient_keys"])
    with locks.wait_for(site, "filing"):  # images that were being taken in have their row by now, or are still files
        site_files.remove_files(site, ledger, keys)
        with ledger.transaction():
            _empty_rows(site, ledger, number, keys)
    listed = ledger.rows("SELECT * FROM forgetting WHERE forget = ?", number)
    if not round_folders.clear_rounds(site, ledger, [row["image"] for row in listed]):
        return False
    remove_files(site, [place for row in listed for place in (row["original"], row["plate"]) if place])
    sop_uids = json.loads(ledger.value("SELECT sop_uids FROM forget WHERE id = ?", number))
    site_files.remove_commitment_requests(site, sop_uids)
    with ledger.transaction():
        ledger.run("DELETE FROM forgetting WHERE forget = ?", number)
        ledger.run("UPDATE forget SET state = 'bytes', patient_keys = '[]', sop_uids = '[]' WHERE id = ?", number)
        audit.append(ledger, forget_row["by"], "patient forgotten", forget_row["reason"], after={"forget": number})
    return True


def _wipe_free_pages(ledger: Ledger) -> str | None:
    """Rewrite the database and empty its log, so that no page holds deleted data; return why it can't be done yet."""
    try:
        ledger.db.execute("VACUUM")
        busy, *_ = ledger.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.OperationalError as error:  # locked, or no disk space for a second copy
        return f"the ledger can't be rewritten yet: {error}"
    return "another process is reading the ledger" if busy else None
