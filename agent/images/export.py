"""`cxrloop images export`: de-identified copies of images in a folder, with their labels keyed by file.

`dicom.outgoing.deidentify` decides what may leave and what a copy holds. Reports and heatmaps for the site's own PACS
are no exports.
"""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from agent.errors import Problem
from agent.images.records import ImageRecord, original_path
from agent.ledger import audit
from agent.ledger.database import Ledger, image_number
from agent.site.site import Site
from cxrloop.durable import write_atomic
from dicom.errors import NotExportable
from dicom.outgoing.deidentify import deidentify

LABELS = "labels.csv"
EXPORTABLE = "superseded_by IS NULL AND reason IS NOT 'forgotten'"


def export(
    site: Site, ledger: Ledger, uids: Iterable[str], folder: Path, with_labels: bool, by: str
) -> dict[str, list[dict[str, Any]]]:
    """Write copies of the images of these UIDs (SOP instance, study) or image numbers into an empty or new folder.

    Returns `{"exported": [{"image", "file"}], "refused": [{"image", "reason"}]}`. Raises Problem for an unknown UID and
    for a folder that is not empty, before anything is written.
    """
    images = {image.id: image for uid in uids for image in _images_of(ledger, uid)}
    if folder.exists() and any(folder.iterdir()):
        raise Problem(
            f"--out {folder}: not empty; name a new folder, so that older files are not taken for this export"
        )
    folder.mkdir(parents=True, exist_ok=True)
    exported: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for image in images.values():
        try:
            file = _export_image(site, image, folder)
        except (NotExportable, Problem) as error:
            refused.append({"image": image.id, "reason": str(error)})
        else:
            exported.append({"image": image.id, "file": file})
    if with_labels:
        write_atomic(folder / LABELS, _labels(ledger, exported).encode())
    with ledger.transaction():
        numbers = [copy["image"] for copy in exported]
        audit.append(ledger, by, "images exported", "de-identified", after={"images": numbers, "labels": with_labels})
    return {"exported": exported, "refused": refused}


def _images_of(ledger: Ledger, uid: str) -> list[ImageRecord]:
    """Return the images of a SOP or Study Instance UID, or the image with this number; raises Problem."""
    for column in ("sop_uid", "study_uid"):
        if rows := ledger.rows(f"SELECT * FROM image WHERE {column} = ? AND {EXPORTABLE} ORDER BY id", uid):
            return [ImageRecord.from_row(row) for row in rows]
    row = ledger.row(f"SELECT * FROM image WHERE id = ? AND {EXPORTABLE}", image_number(uid))
    if not row:
        raise Problem(f"export {uid}: no image with this SOP Instance UID, Study Instance UID or image number")
    return [ImageRecord.from_row(row)]


def _export_image(site: Site, image: ImageRecord, folder: Path) -> str:
    """Write the de-identified copy of one image and return its file name; raises NotExportable, Problem."""
    if image.plate is None:
        raise NotExportable(f"{image.state}: {image.reason}")
    copy = deidentify(original_path(site, image), site.key("pseudonym.key"))
    name = f"{copy.SOPInstanceUID}.dcm"
    if (folder / name).exists():
        raise NotExportable(
            "this export holds another image under the same SOP Instance UID, and a UID names one image"
        )
    data = io.BytesIO()
    copy.save_as(data, enforce_file_format=True)
    write_atomic(folder / name, data.getvalue())
    return name


def _labels(ledger: Ledger, exported: list[dict[str, Any]]) -> str:
    """Return the labels in force as a CSV that `labels import` reads; the names of the labellers are left out."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("file", "finding", "value", "source"))
    for copy in exported:
        sql = "SELECT finding, value, source FROM label_now WHERE image = ? ORDER BY finding"
        for row in ledger.rows(sql, copy["image"]):
            value = "" if row["value"] is None else row["value"]
            table.writerow((copy["file"], row["finding"], value, row["source"]))
    return text.getvalue()
