"""`cxrloop import DIR`: take in the files of a folder, by the same intake as received images.

DICOM files are taken as they are. PNG and JPEG files are wrapped as DX by `dicom.phantom.wrap`, with patient, view, sex
and age from a `labels.csv` in the folder (columns `file` and, where known, `patient_id`, `view`, `sex`, `age`).
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
OTHER_FILES = {".csv", ".md", ".txt", ".json"}  # skipped: no images
BATCH = 64  # files


def import_folder(
    site: Site, ledger: Ledger, folder: Path, view: str, progress: Callable[[int], None] = lambda done: None
) -> dict[str, int]:
    """Take in every file below `folder`; return `{"seen", "stored", "rejected", "quarantined", "duplicate"}`.

    `view` is assumed for pictures without a view in labels.csv. After an interruption run the import again: images that
    are in already count as duplicates. Raises Problem for a missing folder, and for unreadable files after all others
    were taken in.
    """
    if not folder.is_dir():
        raise Problem(f"{folder}: no such folder")
    counts: dict[str, int] = dict.fromkeys(("seen", "stored", "rejected", "quarantined", "duplicate"), 0)
    unreadable: list[str] = []
    facts = _read_facts(folder / "labels.csv")
    fix_shares(ledger, site.config.patients)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix.lower() not in OTHER_FILES)
    with examiner(site) as pool, tempfile.TemporaryDirectory(dir=site.root / "run") as scratch:
        for batch in _batches(files):
            sources = {
                _as_dicom(path, folder, facts, view, Path(scratch) / f"{n}.dcm"): path for n, path in enumerate(batch)
            }
            for path, examined in pool.examine(list(sources)):
                source = sources[path]
                name = _as_text(source.relative_to(folder).as_posix())
                if examined.sha256 == UNREAD:
                    unreadable.append(name)
                    continue
                outcome = take_in(site, ledger, path, examined, utc(), file=name)
                counts["seen"] += 1
                counts[outcome] += 1
                progress(counts["seen"])
    if unreadable:
        raise Problem(
            f"{len(unreadable)} of {len(unreadable) + counts['seen']} files can't be read, the first is "
            f"{unreadable[0]}; the others were taken in: give this user the right to read the files, then import again"
        )
    return counts


def _as_dicom(path: Path, folder: Path, facts: dict[str, dict[str, str]], view: str, wrapped: Path) -> Path:
    """Return the file itself, or for a picture the DICOM file `wrapped` that is made from it."""
    if path.suffix.lower() not in PICTURES:
        return path
    known = facts.get(_as_text(path.relative_to(folder).as_posix())) or facts.get(_as_text(path.name)) or {}
    age = known.get("age") or ""
    try:
        dataset = wrap(
            path,
            patient_id=known.get("patient_id") or _as_text(path.stem).replace("\\", "_"),
            view=known.get("view") or view,
            sex=known.get("sex") or None,
            age_years=float(age) if age.replace(".", "", 1).isdigit() else None,
        )
    except (ValueError, OSError):
        return path  # not a picture: the intake quarantines it with the reason
    dataset.save_as(wrapped, enforce_file_format=True)
    return wrapped


def _as_text(name: str) -> str:
    """Return a file name as text; bytes that are not UTF-8 become \\xNN: ledger and labels.csv hold only text."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _read_facts(path: Path) -> dict[str, dict[str, str]]:
    """Return the cells of labels.csv by file name, without empty ones; empty without labels.csv. Raises Problem."""
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise Problem(f"{path}: not a CSV in UTF-8: {error}") from None
    return {row["file"]: {k: v for k, v in row.items() if k and v} for row in rows if row.get("file")}


def _batches(files: Iterator[Path]) -> Iterator[list[Path]]:
    batch: list[Path] = []
    for path in files:
        batch.append(path)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
