"""`forget`: every image of a patient leaves the site folder, and nothing in it leads back to the patient.

One transaction turns the rows into nameless ones (their numbers stay, for rounds and counts) and says what is still to be
done; then files, round folders and the database's own free space follow, each step harmless to repeat: `finish`, which
every tick calls. What models have learnt can't be undone, and is said. No word of the patient in audit or log.
"""

import json
import re
import secrets
import sqlite3
from collections.abc import Collection, Iterable
from typing import Any

from agent.erasure import round_folders, site_files
from agent.errors import Problem
from agent.images.retention import unlink
from agent.ledger import audit
from agent.ledger.database import Ledger, Row, canonical, utc
from agent.ledger.schema import FORGOTTEN
from agent.site import locks
from agent.site.site import Site
from dicom.pseudonyms import PLACEHOLDERS, patient_key, refusal, study_mark

KEY = re.compile(r"[ps][0-9a-f]{16}")
EMPTIED = (  # of an image row: all that says anything of the image
    "sop_uid", "study_uid", "patient_key", "range", "view", "acquired_at", "sex", "age_years", "scanner",
    "transfer_syntax", "pixel_sha256", "plate", "plate_version", "file", "superseded_by", "returned_at",
)  # fmt: skip
BURIED = "SELECT image FROM forgetting"


def pseudonyms_of(site: Site, patient: str, issuers: Iterable[str]) -> list[str]:
    """The pseudonyms of a patient id: without an issuer (IssuerOfPatientID), and with each of `issuers`."""
    if patient.strip().upper() in PLACEHOLDERS:
        raise Problem(
            "forget: that id stands for no patient; name a pseudonym with --key (`cxrloop studies ls --json`)"
        )
    key = site.key("pseudonym.key")
    return [patient_key(key, patient, issuer, "")[0] for issuer in dict.fromkeys(("", *issuers))]


def checked_key(key: str) -> str:
    """A pseudonym as `studies ls` prints it; raises Problem."""
    if not KEY.fullmatch(key):
        raise Problem("--key: a pseudonym is p or s and 16 hex digits, as `cxrloop studies ls --json` prints it")
    return key


def preview(site: Site, ledger: Ledger, keys: Collection[str]) -> dict[str, Any]:
    """What would go: numbers, golden versions, rounds, bundles. Changes nothing."""
    images = images_of(site, ledger, keys)
    waiting = len(site_files.waiting(site, keys))
    return {**_counted(ledger, images), "waiting": waiting, **round_folders.learnt(site, ledger, images)}


def forget(site: Site, ledger: Ledger, keys: Collection[str], by: str, reason: str, refuse: bool) -> dict[str, Any]:
    """Forget the patient of these pseudonyms, and refuse later images with `refuse`; what went, and whether all of it has.

    Raises Problem when nothing is here and nothing is to be refused.
    """
    if not by.strip() or not reason.strip():
        raise Problem("forget: say who (--by) and why (--reason); both are kept, so don't name the patient in them")
    finish(site, ledger)  # one that died half-way: its rows are nameless, and only this still finds their remains
    said = preview(site, ledger, keys)
    if not (said["images"] or said["waiting"] or refuse):
        raise Problem(
            "forget: nothing of this patient is here; where images name an issuer of patient ids, give --issuer"
        )
    with locks.wait_for(site, "filing"), ledger.transaction():
        what = {name: said[name] for name in ("images", "golden", "rounds", "bundles")}
        number = ledger.insert(
            "forget", state="files", patient_keys=canonical(sorted(keys)), sop_uids="[]", by=by, reason=reason, at=utc()
        )
        audit.append(ledger, by, "patient to be forgotten", reason, after={"forget": number, "refuse": refuse, **what})
        _empty_rows(site, ledger, number, keys)
        for key in keys if refuse else ():
            hashed = refusal(site.key("pseudonym.key"), key)
            ledger.run("INSERT OR IGNORE INTO refused_patient VALUES (?, ?)", hashed, utc())
    why = finish(site, ledger)
    later = "refused" if refuse else "taken in again"
    return {"state": "pending" if why else "done", "pending": why, **said, "later_images": later}


def images_of(site: Site, ledger: Ledger, keys: Collection[str]) -> list[int]:
    """Rows of a patient: by pseudonym, the older versions that they correct, and unreadable files that name the id."""
    mine = "SELECT id FROM image WHERE patient_key IN (SELECT value FROM json_each(?))"
    found = [row["id"] for row in ledger.rows(mine, canonical(sorted(keys)))]
    older = "SELECT id FROM image WHERE sop_uid = (SELECT sop_uid FROM image WHERE id = ?) AND superseded_by = ?"
    for image in found:  # grows while it is walked: corrections of corrections
        found += [row["id"] for row in ledger.rows(older, image, image) if row["id"] not in found]
    nameless = (
        "SELECT id, original FROM image WHERE state = 'quarantined' AND patient_key IS NULL AND dropped_at IS NULL"
    )
    for row in ledger.rows(nameless):
        if site_files.names(site.store.path(row["original"]), site.key("pseudonym.key"), keys):
            found.append(row["id"])
    return found


def _counted(ledger: Ledger, images: list[int]) -> dict[str, Any]:
    wanted, these = canonical(images), "IN (SELECT value FROM json_each(?))"

    def count(sql: str) -> int:
        return ledger.value(f"SELECT count(*) FROM {sql} {these}", wanted)

    return {
        "images": len(images),
        "originals": count("image WHERE plate IS NOT NULL AND dropped_at IS NULL AND id"),
        "aside": count("image WHERE plate IS NULL AND dropped_at IS NULL AND id"),
        "predictions": count("prediction WHERE image"),
        "labels": count("label WHERE image"),
        "golden": ledger.rows(
            f"SELECT version, count(DISTINCT image) AS images FROM golden_image WHERE image {these} GROUP BY version",
            wanted,
        ),
    }


def _empty_rows(site: Site, ledger: Ledger, number: int, keys: Collection[str]) -> None:
    """Make the patient's rows nameless and note their files, within the caller's transaction."""
    images = images_of(site, ledger, keys)
    uids = set(json.loads(ledger.value("SELECT sop_uids FROM forget WHERE id = ?", number)))
    for image in images:
        row = ledger.rows("SELECT * FROM image WHERE id = ?", image)[0]
        ledger.insert("forgetting", image=image, forget=number, original=row["original"], plate=row["plate"])
        uids.add(row["sop_uid"] or "")
    ledger.run("UPDATE forget SET sop_uids = ? WHERE id = ?", canonical(sorted(uids)), number)
    lost = (
        f"SELECT version, count(DISTINCT image) AS images FROM golden_image WHERE image IN ({BURIED}) GROUP BY version"
    )
    for row in ledger.rows(lost):
        ledger.insert("golden_loss", **row, at=utc())
    for table in of_a_image(ledger):
        ledger.run(f"DELETE FROM {table} WHERE image IN ({BURIED})")
    _drop_pulled(site, ledger, images)
    nothing = ", ".join(f"{column} = NULL" for column in EMPTIED)
    for image in images:
        now = utc()
        ledger.run(
            f"UPDATE image SET {nothing}, state = 'rejected', reason = ?, sha256 = ?, original = '', heartbeat = 0, "
            "received_at = ?, stored_at = ?, dropped_at = ? WHERE id = ?",
            FORGOTTEN, f"{FORGOTTEN} {secrets.token_hex(16)}", now, now, now, image,
        )  # fmt: skip


def of_a_image(ledger: Ledger) -> list[str]:
    """Every table that says something of an image, whoever made it; `forgetting` is the list of what goes."""
    tables = ledger.rows(
        "SELECT m.name FROM sqlite_master m JOIN pragma_table_info(m.name) c ON c.name = 'image' WHERE m.type = 'table'"
    )
    return [row["name"] for row in tables if row["name"] != "forgetting"]


def _drop_pulled(site: Site, ledger: Ledger, images: list[int]) -> None:
    """Their studies count as pulled no more, so that an image which an archive still has can come in again."""
    studies = "SELECT DISTINCT study_uid FROM image WHERE study_uid NOT NULL AND id IN (SELECT value FROM json_each(?))"
    for row in ledger.rows(studies, canonical(images)):
        ledger.run("DELETE FROM pulled WHERE study = ?", study_mark(site.key("pseudonym.key"), row["study_uid"]))


def finish(site: Site, ledger: Ledger) -> str | None:
    """Go on with every `forget` that is not done; None when none is left, else what it waits for.

    Harmless to repeat, at any moment and in any number of processes.
    """
    unfinished = "SELECT * FROM forget WHERE state != 'done' ORDER BY id"
    if not ledger.value(unfinished):
        return None
    with locks.wait_for(site, "forget"):
        for row in ledger.rows(unfinished):
            if row["state"] == "files" and not _files(site, ledger, row):
                return "a round that held an image is just being planned, or its learner has not left yet"
        if why := _bytes_left(ledger):
            return why
        with ledger.transaction():
            ledger.run("UPDATE forget SET state = 'done', done_at = ? WHERE state = 'bytes'", utc())
    return None


def _files(site: Site, ledger: Ledger, row: Row) -> bool:
    """Remove the patient's files, then the pseudonym itself; False when a learner still holds some."""
    keys = json.loads(row["patient_keys"])
    with locks.wait_for(site, "filing"):  # what was on its way in when the rows went has its row by now, or never will
        site_files.remove(site, ledger, keys)
        with ledger.transaction():
            _empty_rows(site, ledger, row["id"], keys)
    mine = ledger.rows("SELECT * FROM forgetting WHERE forget = ?", row["id"])
    if not round_folders.clear(site, ledger, [image["image"] for image in mine]):
        return False
    unlink(site, [place for image in mine for place in (image["original"], image["plate"]) if place])
    site_files.drop_requests(site, json.loads(ledger.value("SELECT sop_uids FROM forget WHERE id = ?", row["id"])))
    with ledger.transaction():
        ledger.run("DELETE FROM forgetting WHERE forget = ?", row["id"])
        ledger.run("UPDATE forget SET state = 'bytes', patient_keys = '[]', sop_uids = '[]' WHERE id = ?", row["id"])
        audit.append(ledger, row["by"], "patient forgotten", row["reason"], after={"forget": row["id"]})
    return True


def _bytes_left(ledger: Ledger) -> str | None:
    """Write the database anew and empty its log, so that what was deleted is in no page; why not, when it can't be."""
    try:
        ledger.db.execute("VACUUM")
        busy, *_ = ledger.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.OperationalError as error:  # locked, or no room for a second copy
        return f"the ledger can't be written anew yet: {error}"
    return "a reader holds the ledger's log" if busy else None
