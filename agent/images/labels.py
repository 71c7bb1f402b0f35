"""Labels from a CSV: all of it or nothing; append-only, an adjudicated label beats a radiologist's, that a report's.

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
class Line:
    """One checked row of the CSV."""

    key: str
    finding: str
    value: int | None
    source: str
    by: str


def import_csv(site: Site, ledger: Ledger, path: Path, by: str) -> dict[str, int]:
    """Add the labels of a CSV; `{"rows", "added", "unknown_images", "conflicts"}`.

    Unknown images are counted, not written. A conflict is a label of the same source that said the
    opposite: the newer one counts. Raises Problem with file:line at the first bad row; then nothing is written.
    """
    keyed_by, lines = read(path, site.findings, by)
    find = _Finder(ledger, keyed_by)
    added = unknown = conflicts = 0
    with ledger.transaction():
        for line in lines:
            images = find(line.key)
            unknown += not images
            for image in images:
                now = ledger.row(
                    "SELECT value, source FROM label_now WHERE image = ? AND finding = ?", image, line.finding
                )
                if now is None and line.value is None:
                    continue  # unknown is what it already is
                if now and (now["value"], now["source"]) == (line.value, line.source):
                    continue
                if now and now["source"] == line.source and None not in (now["value"], line.value):
                    conflicts += 1
                ledger.insert(
                    "label",
                    image=image,
                    finding=line.finding,
                    value=line.value,
                    source=line.source,
                    by=line.by,
                    at=utc(),
                )
                added += 1
        result = {"rows": len(lines), "added": added, "unknown_images": unknown, "conflicts": conflicts}
        audit.append(ledger, by, "labels imported", f"{len(lines)} rows", after=result)
    return result


def read(path: Path, findings: tuple[str, ...], by: str) -> tuple[str, list[Line]]:
    """The key column and the checked rows of a CSV; raises Problem with file:line and why."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            key = _key_column(path, header)
            return key, [_line(path, reader.line_num, row, key, findings, by) for row in reader]
    except FileNotFoundError:
        raise Problem(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise Problem(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except csv.Error as error:
        raise Problem(f"{path}: not a CSV: {error}") from None


def _key_column(path: Path, header: list[str]) -> str:
    keys = [name for name in ("sop_uid", "file") if name in header]
    missing = [name for name in ("finding", "value") if name not in header]
    if len(keys) != 1 or missing:
        raise Problem(
            f"{path}:1: columns {', '.join(header) or '(none)'}; needs `sop_uid` or `file` (one of them), "
            "`finding`, `value`, and may have `source`, `by`"
        )
    return keys[0]


def _line(
    path: Path, number: int, row: dict[str | None, str | None], key: str, findings: tuple[str, ...], by: str
) -> Line:
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
    return Line(cell[key], cell["finding"], VALUES[cell["value"]], source, cell.get("by") or by)


class _Finder:
    """Images by SOP Instance UID, or by the name of the imported file (its path, else its bare name if unique)."""

    def __init__(self, ledger: Ledger, keyed_by: str) -> None:
        self.ledger, self.keyed_by = ledger, keyed_by
        self.bare: dict[str, list[int]] | None = None

    def __call__(self, key: str) -> list[int]:
        if self.keyed_by == "file":
            key = str(PurePosixPath(key.replace("\\", "/")))
        found = self.ledger.rows(
            f"SELECT id FROM image WHERE {self.keyed_by} = ? AND plate IS NOT NULL AND superseded_by IS NULL", key
        )
        if found or self.keyed_by == "sop_uid":
            return [row["id"] for row in found]
        if self.bare is None:
            self.bare = defaultdict(list)
            for row in self.ledger.rows(
                "SELECT id, file FROM image WHERE file IS NOT NULL AND plate IS NOT NULL AND superseded_by IS NULL"
            ):
                self.bare[PurePosixPath(row["file"]).name].append(row["id"])
        candidates = self.bare.get(PurePosixPath(key).name, [])
        return candidates if len(candidates) == 1 else []
