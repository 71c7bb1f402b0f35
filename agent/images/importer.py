"""`cxrloop import DIR`: files on disk through the same intake as the node.

DICOM as it is; PNG and JPEG are wrapped as DX by `dicom.phantom.wrap`, with patient, view, sex and age from a
`labels.csv` beside them (columns `file`, and where known `patient_id`, `view`, `sex`, `age`).
"""

import csv
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.errors import Problem
from agent.images.intake import examiner, take_in
from agent.ledger.database import Ledger, utc
from agent.site.site import Site
from agent.site.splits import fix_shares
from dicom.intake.examiner import UNREAD
from dicom.phantom.wrap import wrap

PICTURES = {".png", ".jpg", ".jpeg"}
SIDE_FILES = {".csv", ".md", ".txt", ".json"}  # company of the images, not images
CHUNK = 64


def import_folder(
    site: Site, ledger: Ledger, folder: Path, view: str, progress: Callable[[int], None] = lambda done: None
) -> dict[str, int]:
    """Take in every file under `folder`; `{"seen", "stored", "rejected", "quarantined", "duplicate"}`.

    `view` is assumed for pictures whose view labels.csv does not tell. Can be run again after an interruption:
    what is in already counts as duplicate. Raises Problem when the folder is not there, and, after all others are in,
    when a file could not be read.
    """
    if not folder.is_dir():
        raise Problem(f"{folder}: no such folder")
    counts: dict[str, int] = dict.fromkeys(("seen", "stored", "rejected", "quarantined", "duplicate"), 0)
    unread: list[str] = []
    facts = _facts(folder / "labels.csv")
    fix_shares(ledger, site.config.patients)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix.lower() not in SIDE_FILES)
    with examiner(site) as pool, tempfile.TemporaryDirectory(dir=site.root / "run") as scratch:
        for batch in _chunks(files):
            ready = {
                _readable(path, folder, facts, view, Path(scratch) / f"{n}.dcm"): path for n, path in enumerate(batch)
            }
            for path, examined in pool.examine(list(ready)):
                source = ready[path]
                received = utc()
                name = _spelt(source.relative_to(folder).as_posix())
                if examined.sha256 == UNREAD:
                    unread.append(name)
                    continue
                outcome = take_in(site, ledger, path, examined, received, file=name)
                counts["seen"] += 1
                counts[outcome] += 1
                progress(counts["seen"])
    if unread:
        raise Problem(
            f"{len(unread)} of {len(unread) + counts['seen']} files can't be read, {unread[0]} first; the others are in: "
            "give this user the right to read them, and import again"
        )
    return counts


def _readable(path: Path, folder: Path, facts: dict[str, dict[str, str]], view: str, wrapped: Path) -> Path:
    """The file itself, or for a picture the DICOM file made of it."""
    if path.suffix.lower() not in PICTURES:
        return path
    known = facts.get(_spelt(path.relative_to(folder).as_posix())) or facts.get(_spelt(path.name)) or {}
    age = known.get("age") or ""
    try:
        dataset = wrap(
            path,
            patient_id=known.get("patient_id") or _spelt(path.stem).replace("\\", "_"),
            view=known.get("view") or view,
            sex=known.get("sex") or None,
            age_years=float(age) if age.replace(".", "", 1).isdigit() else None,
        )
    except (ValueError, OSError):
        return path  # no picture after all: intake quarantines it with the reason
    dataset.save_as(wrapped, enforce_file_format=True)
    return wrapped


def _spelt(name: str) -> str:
    """A file's name as text: bytes that are no UTF-8 (an old archive's) as \\xNN, for neither ledger nor labels.csv holds them."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _facts(path: Path) -> dict[str, dict[str, str]]:
    """What labels.csv says of each file, by its name; empty when there is none."""
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise Problem(f"{path}: not a table in UTF-8: {error}") from None
    return {row["file"]: {k: v for k, v in row.items() if k and v} for row in rows if row.get("file")}


def _chunks(files: Iterator[Path]) -> Iterator[list[Path]]:
    batch: list[Path] = []
    for path in files:
        batch.append(path)
        if len(batch) == CHUNK:
            yield batch
            batch = []
    if batch:
        yield batch
