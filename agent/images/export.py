"""Images that leave the site: de-identified copies in a folder, and their labels keyed by file.

What may leave and how it looks is `dicom.outgoing.deidentify`; answers to the site's own PACS are no exports.
"""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from agent.errors import Problem
from agent.ledger import audit
from agent.ledger.database import Ledger, Row, image_number
from agent.site import files
from agent.site.site import Site
from cxrloop.durable import write_atomic
from dicom.errors import NotExportable
from dicom.outgoing.deidentify import deidentify

LABELS = "labels.csv"
NEWEST = "superseded_by IS NULL AND reason IS NOT 'forgotten'"


def export(
    site: Site, ledger: Ledger, uids: Iterable[str], folder: Path, with_labels: bool, by: str
) -> dict[str, list[dict[str, Any]]]:
    """Write the images of these UIDs (SOP instance, study) or image numbers into an empty or new folder.

    `{"exported": [{"image", "file"}], "refused": [{"image", "reason"}]}`. Raises Problem for an unknown UID and for a folder
    that holds something; then nothing is written.
    """
    rows = {row["id"]: row for uid in uids for row in _named(ledger, uid)}
    if folder.exists() and any(folder.iterdir()):
        raise Problem(f"--out {folder}: not empty; name a new folder, so that nobody takes old images for these")
    folder.mkdir(parents=True, exist_ok=True)
    exported: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for row in rows.values():
        try:
            if row["plate"] is None:
                raise NotExportable(f"set aside: {row['reason']}")
            image = deidentify(files.original(site, row), site.key("pseudonym.key"))
            name = f"{image.SOPInstanceUID}.dcm"
            if (folder / name).exists():
                raise NotExportable(
                    "another image under the same SOP Instance UID leaves already, and one UID is one image"
                )
        except (NotExportable, Problem) as why:
            refused.append({"image": row["id"], "reason": str(why)})
            continue
        data = io.BytesIO()
        image.save_as(data, enforce_file_format=True)
        write_atomic(folder / name, data.getvalue())
        exported.append({"image": row["id"], "file": name})
    if with_labels:
        write_atomic(folder / LABELS, _labels(ledger, exported).encode())
    with ledger.transaction():
        left = [image["image"] for image in exported]
        audit.append(ledger, by, "images exported", "de-identified", after={"images": left, "labels": with_labels})
    return {"exported": exported, "refused": refused}


def _named(ledger: Ledger, uid: str) -> list[Row]:
    """The images of one UID, else of one image number."""
    for column in ("sop_uid", "study_uid"):
        if rows := ledger.rows(f"SELECT * FROM image WHERE {column} = ? AND {NEWEST} ORDER BY id", uid):
            return rows
    rows = ledger.rows(f"SELECT * FROM image WHERE id = ? AND {NEWEST}", image_number(uid))
    if not rows:
        raise Problem(f"export {uid}: no image with this SOP Instance UID, Study Instance UID or image number")
    return rows


def _labels(ledger: Ledger, exported: list[dict[str, Any]]) -> str:
    """The labels that count, as `labels import` reads them; who gave them stays here."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("file", "finding", "value", "source"))
    for image in exported:
        sql = "SELECT finding, value, source FROM label_now WHERE image = ? ORDER BY finding"
        for row in ledger.rows(sql, image["image"]):
            value = "" if row["value"] is None else row["value"]
            table.writerow((image["file"], row["finding"], value, row["source"]))
    return text.getvalue()
