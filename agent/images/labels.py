"""`cxrloop labels import`: labels from a CSV, all rows or none. Labels are append-only.

An adjudicated label outranks a radiologist's label, which outranks a report's label.

Columns: `sop_uid` or `file`, `finding`, `value` (1, 0, empty = unknown), optional `source`, `by`.
"""

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from agent.errors import Problem
from agent.ledger import audit
from agent.ledger.database import Ledger, utc
from agent.site.site import Site

SOURCES = ("report", "radiologist", "adjudicated")  # weakest first
VALUES = {"1": 1, "0": 0, "": None}
COLUMNS = {"sop_uid", "file", "finding", "value", "source", "by"}


@dataclass(frozen=True)
class LabelRow:
    """One checked row of the CSV; `key` is the value of `sop_uid` or `file`."""

    key: str
    finding: str
    value: int | None
    source: str
    by: str


def import_csv(site: Site, ledger: Ledger, path: Path, by: str) -> dict[str, int]:
    """Add the labels of a CSV; return `{"rows", "added", "unknown_images", "conflicts"}`.

    Labels of unknown images are counted, not written. A conflict is an earlier label of the same source with the
    opposite value: the newer label counts. Raises Problem with file:line at the first bad row, before any change.
    """
    key_column, rows = read(path, site.findings, by)
    images_of = _ImageFinder(ledger, key_column)
    added = unknown = conflicts = 0
    with ledger.transaction():
        for row in rows:
            images = images_of(row.key)
            unknown += not images
            for image in images:
                current = ledger.row(
                    "SELECT value, source FROM label_now WHERE image = ? AND finding = ?", image, row.finding
                )
                if current is None and row.value is None:
                    continue  # it is unknown already
                if current and (current["value"], current["source"]) == (row.value, row.source):
                    continue
                if current and current["source"] == row.source and None not in (current["value"], row.value):
                    conflicts += 1
                ledger.insert(
                    "label",
                    image=image,
                    finding=row.finding,
                    value=row.value,
                    source=row.source,
                    by=row.by,
                    at=utc(),
                )
                added += 1
        result = {"rows": len(rows), "added": added, "unknown_images": unknown, "conflicts": conflicts}
        audit.append(ledger, by, "labels imported", f"{len(rows)} rows", after=result)
    return result


def read(path: Path, findings: tuple[str, ...], by: str) -> tuple[str, list[LabelRow]]:
    """Return the key column and the checked rows of a CSV; raises Problem with file:line and the reason."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            key = _key_column(path, header)
            return key, [_checked_row(path, reader.line_num, row, key, findings, by) for row in reader]
    except FileNotFoundError:
        raise Problem(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise Problem(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except csv.Error as error:
        raise Problem(f"{path}: not a CSV: {error}") from None


def _key_column(path: Path, header: list[str]) -> str:
    """Return "sop_uid" or "file", whichever column the header has; raises Problem."""
    keys = [name for name in ("sop_uid", "file") if name in header]
    missing = [name for name in ("finding", "value") if name not in header]
    if len(keys) != 1 or missing:
        raise Problem(
            f"{path}:1: columns {', '.join(header) or '(none)'}; needs `sop_uid` or `file` (one of them), "
            "`finding`, `value`, and may have `source`, `by`"
        )
    return keys[0]


def _checked_row(
    path: Path, number: int, row: dict[str | None, str | None], key: str, findings: tuple[str, ...], by: str
) -> LabelRow:
    where = f"{path}:{number}"
    if None in row or None in row.values():
        raise Problem(f"{where}: more or fewer fields than the header has")
    cell = {str(name): str(value).strip() for name, value in row.items()}
    if not cell[key]:
        raise Problem(f"{where}: {key} is empty")
    if cell["finding"] not in findings:
        raise Problem(f"{where}: finding {cell['finding']!r} is not one of the site's: {', '.join(findings)}")
    if cell["value"] not in VALUES:
        raise Problem(f"{where}: value {cell['value']!r}; use 1, 0 or empty (unknown)")
    source = cell.get("source") or "report"
    if source not in SOURCES:
        raise Problem(f"{where}: source {source!r}; use one of {', '.join(reversed(SOURCES))}")
    return LabelRow(cell[key], cell["finding"], VALUES[cell["value"]], source, cell.get("by") or by)


class _ImageFinder:
    """Finds images by SOP Instance UID, or by the path of the imported file, else by its name where that is unique."""

    def __init__(self, ledger: Ledger, key_column: str) -> None:
        self.ledger, self.key_column = ledger, key_column
        self.by_name: dict[str, list[int]] | None = None  # read at the first path that no image has

    def __call__(self, key: str) -> list[int]:
        if self.key_column == "file":
            key = str(PurePosixPath(key.replace("\\", "/")))
        rows = self.ledger.rows(
            f"SELECT id FROM image WHERE {self.key_column} = ? AND plate IS NOT NULL AND superseded_by IS NULL", key
        )
        if rows or self.key_column == "sop_uid":
            return [row["id"] for row in rows]
        if self.by_name is None:
            self.by_name = defaultdict(list)
            for row in self.ledger.rows(
                "SELECT id, file FROM image WHERE file IS NOT NULL AND plate IS NOT NULL AND superseded_by IS NULL"
            ):
                self.by_name[PurePosixPath(row["file"]).name].append(row["id"])
        candidates = self.by_name.get(PurePosixPath(key).name, [])
        return candidates if len(candidates) == 1 else []
