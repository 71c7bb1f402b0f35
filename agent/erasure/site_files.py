"""A patient's files without a row: in the inbox, the drop folder, scratch, and files that a crash left in the store.

Reads headers, and raw bytes where a header is unreadable; removes the files of the patient. Must not import
`agent.rounds`.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from agent.ledger.database import Ledger
from agent.site.site import Site
from dicom.dataset import header
from dicom.dataset.part10 import content_sha256, open_envelope, read_header
from dicom.errors import Unreadable
from dicom.pseudonyms import patient_key

FRESH_S = 3600  # a scratch file younger than this may belong to a running import
RAW_BYTES = 4 << 20  # of an unreadable file are searched for an id: headers are shorter
# PatientID (0010,0020) and its length: explicit and implicit little endian, explicit big endian
RAW_ID = (
    re.compile(rb"\x10\x00\x20\x00LO(..)", re.S),
    re.compile(rb"\x10\x00\x20\x00(..)\x00\x00", re.S),
    re.compile(rb"\x00\x10\x00\x20LO(..)", re.S),
)
LONGEST_ID = 128  # bytes; LO has 64 characters


def patient_of(path: Path, key: bytes) -> str | None:
    """Return the pseudonym of a file's patient, None for an unreadable header; raises OSError."""
    with path.open("rb") as stream:
        try:
            dataset = read_header(stream, open_envelope(stream).transfer_syntax, pixels=False).dataset
        except Unreadable:
            return None
    study = header.text(dataset, "StudyInstanceUID")
    issuer = header.text(dataset, "IssuerOfPatientID")
    return patient_key(key, header.text(dataset, "PatientID"), issuer, study)[0]


def contains_patient_id(path: Path, key: bytes, pseudonyms: Iterable[str]) -> bool:
    """Return True when an unreadable file holds the PatientID of one of these pseudonyms (of ids without an issuer)."""
    try:
        with path.open("rb") as stream:
            data = stream.read(RAW_BYTES)
    except FileNotFoundError:
        return False
    return any(patient_key(key, patient_id, "", "")[0] in pseudonyms for patient_id in _raw_ids(data))


def _raw_ids(data: bytes) -> Iterator[str]:
    """Yield every value in these bytes that looks like a PatientID element, in two encodings."""
    for number, pattern in enumerate(RAW_ID):
        for match in pattern.finditer(data):
            length = int.from_bytes(match[1], "big" if number == 2 else "little")
            if 0 < length <= LONGEST_ID:
                value = data[match.end() : match.end() + length]
                for encoding in ("utf-8", "latin-1"):
                    yield value.decode(encoding, "replace").strip(" \0")


def belongs_to(path: Path, key: bytes, pseudonyms: Iterable[str]) -> bool:
    """Return True when a file is an image of one of these pseudonyms; False when the file is gone."""
    try:
        pseudonym = patient_of(path, key)
        return pseudonym in pseudonyms if pseudonym else contains_patient_id(path, key, pseudonyms)
    except FileNotFoundError:
        return False


def incoming_files(site: Site, pseudonyms: Iterable[str]) -> list[Path]:
    """Return the patient's files in the inbox, in the drop folder, and in the scratch of an import that died."""
    key, pseudonyms = site.key("pseudonym.key"), frozenset(pseudonyms)
    paths = [*site.inbox.waiting(), *(site.root / "drop").rglob("*")]
    in_use = time.time() - FRESH_S
    paths += [path for path in (site.root / "run").rglob("*.dcm") if path.stat().st_mtime < in_use]
    return [path for path in paths if path.is_file() and not path.is_symlink() and belongs_to(path, key, pseudonyms)]


def orphans(site: Site, ledger: Ledger, pseudonyms: Iterable[str]) -> list[Path]:
    """Return the patient's files in the store that have no row (a crash between the two). Reads the whole store."""
    key, pseudonyms = site.key("pseudonym.key"), frozenset(pseudonyms)
    return [
        path
        for folder in ("originals", "aside")
        for path in (site.store.folder / folder).glob("??/*.dcm")
        if not ledger.value("SELECT 1 FROM image WHERE sha256 = ?", path.stem) and belongs_to(path, key, pseudonyms)
    ]


def remove_files(site: Site, ledger: Ledger, pseudonyms: Iterable[str]) -> int:
    """Remove the patient's files without a row, and half-written files; return how many.

    The caller holds the filing lock.
    """
    pseudonyms, count = frozenset(pseudonyms), 0
    site.inbox.sweep()
    for temp in site.store.folder.glob("*/.tmp-*"):  # nobody writes such a file while the lock is held
        temp.unlink(missing_ok=True)
    for path in (*incoming_files(site, pseudonyms), *orphans(site, ledger, pseudonyms)):
        sha256 = content_sha256(path)
        if not ledger.value("SELECT 1 FROM image WHERE sha256 = ?", sha256):  # kept already, its row not yet written
            for place in (f"originals/{sha256[:2]}/{sha256}.dcm", f"plates/{sha256[:2]}/{sha256}.npy"):
                site.store.path(place).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        count += 1
    return count


def remove_commitment_requests(site: Site, sop_uids: Iterable[str]) -> None:
    """Remove storage commitment requests that name one of these images; a peer that asks again gets a failure."""
    forgotten = frozenset(sop_uids)
    for path in (site.root / "node" / "commitment").glob("*.json"):
        try:
            references = json.loads(path.read_bytes())["references"]
        except FileNotFoundError:  # reported in the meantime
            continue
        if any(sop_uid in forgotten for _, sop_uid in references):
            path.unlink(missing_ok=True)
