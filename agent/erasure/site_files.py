"""Where a patient's images may lie as files without a row: the inbox, the drop folder, scratch, orphans of a crash.

Reads headers, and raw bytes where a header can't be read; removes what belongs to the patient. Knows no round.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from agent.ledger.database import Ledger
from agent.site.site import Site
from dicom.dataset import header
from dicom.dataset.part10 import Unreadable, content_sha256, open_envelope, read_header
from dicom.pseudonyms import patient_key

FRESH_S = 3600  # scratch younger than this may be in use by an import at work
LOOKED_AT = 4 << 20  # bytes of an unreadable file in which an id is looked for: headers are shorter
# PatientID (0010,0020) and its value: explicit and implicit little endian, explicit big endian
RAW_ID = (
    re.compile(rb"\x10\x00\x20\x00LO(..)", re.S),
    re.compile(rb"\x10\x00\x20\x00(..)\x00\x00", re.S),
    re.compile(rb"\x00\x10\x00\x20LO(..)", re.S),
)
LONGEST_ID = 128  # bytes; LO has 64 characters


def patient_of(path: Path, key: bytes) -> str | None:
    """The pseudonym of a file's header; None when it can't be read. Raises OSError."""
    with path.open("rb") as stream:
        try:
            ds = read_header(stream, open_envelope(stream).transfer_syntax, pixels=False).dataset
        except Unreadable:
            return None
    study = header.text(ds, "StudyInstanceUID")
    return patient_key(key, header.text(ds, "PatientID"), header.text(ds, "IssuerOfPatientID"), study)[0]


def names(path: Path, key: bytes, keys: Iterable[str]) -> bool:
    """Whether an unreadable file holds a PatientID element of one of these pseudonyms (of ids without an issuer)."""
    try:
        with path.open("rb") as stream:
            data = stream.read(LOOKED_AT)
    except FileNotFoundError:
        return False
    return any(patient_key(key, found, "", "")[0] in keys for found in _raw_ids(data))


def _raw_ids(data: bytes) -> Iterator[str]:
    for number, pattern in enumerate(RAW_ID):
        for match in pattern.finditer(data):
            length = int.from_bytes(match[1], "big" if number == 2 else "little")
            if 0 < length <= LONGEST_ID:
                value = data[match.end() : match.end() + length]
                for encoding in ("utf-8", "latin-1"):
                    yield value.decode(encoding, "replace").strip(" \0")


def belongs(path: Path, key: bytes, keys: Iterable[str]) -> bool:
    """Whether a file is an image of one of these pseudonyms; False when it is gone."""
    try:
        who = patient_of(path, key)
        return who in keys if who else names(path, key, keys)
    except FileNotFoundError:
        return False


def waiting(site: Site, keys: Iterable[str]) -> list[Path]:
    """Images of the patient on their way in: inbox, drop folder, and what an import that died left behind."""
    key, keys = site.key("pseudonym.key"), frozenset(keys)
    places = [*site.inbox.waiting(), *(site.root / "drop").rglob("*")]
    young = time.time() - FRESH_S
    places += [path for path in (site.root / "run").rglob("*.dcm") if path.stat().st_mtime < young]
    return [path for path in places if path.is_file() and not path.is_symlink() and belongs(path, key, keys)]


def orphans(site: Site, ledger: Ledger, keys: Iterable[str]) -> list[Path]:
    """Files in the store without a row (a crash between the two) that are the patient's. Walks the whole store."""
    key, keys, found = site.key("pseudonym.key"), frozenset(keys), []
    for part in ("originals", "aside"):
        for path in (site.store.folder / part).glob("??/*.dcm"):
            row = ledger.value("SELECT 1 FROM image WHERE sha256 = ?", path.stem)
            if not row and belongs(path, key, keys):
                found.append(path)
    return found


def remove(site: Site, ledger: Ledger, keys: Iterable[str]) -> int:
    """Remove the patient's files that no row names, and half-written ones; how many. The caller holds the filing lock."""
    keys, count = frozenset(keys), 0
    site.inbox.sweep()
    for temp in site.store.folder.glob("*/.tmp-*"):  # under the lock nobody is writing one
        temp.unlink(missing_ok=True)
    for path in (*waiting(site, keys), *orphans(site, ledger, keys)):
        sha256 = content_sha256(path)
        if not ledger.value("SELECT 1 FROM image WHERE sha256 = ?", sha256):  # kept already, its row not yet written
            for place in (f"originals/{sha256[:2]}/{sha256}.dcm", f"plates/{sha256[:2]}/{sha256}.npy"):
                site.store.path(place).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        count += 1
    return count


def drop_requests(site: Site, sop_uids: Iterable[str]) -> None:
    """Remove storage commitment requests that name one of these images: their peer may ask again, and hears no."""
    wanted = frozenset(sop_uids)
    for path in (site.root / "node" / "commitment").glob("*.json"):
        try:
            asked = json.loads(path.read_bytes())["references"]
        except FileNotFoundError:  # reported meanwhile
            continue
        if any(uid in wanted for _, uid in asked):
            path.unlink(missing_ok=True)
