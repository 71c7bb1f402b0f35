"""What storage commitment asks: is this image here, byte for byte? Looked up in the inbox, then in the ledger.

Reads only, also where the site folder is mounted read-only (the listener's unit may write the inbox alone).
"""

import json
import logging
import sqlite3
from collections import defaultdict
from pathlib import Path
from urllib.parse import quote

from agent.site.site import Site
from dicom.errors import LookupFailed
from dicom.node.commitment import NO_SUCH_INSTANCE, PROCESSING_FAILURE, Reference
from dicom.node.copy_check import check_copy, inbox_copies

log = logging.getLogger("cxrloop.commitment")

BUSY_S = 5  # readers of a WAL never wait for its writer; only a recovery takes a moment


def held(site: Site, references: list[Reference]) -> list[int]:
    """For each (SOP class, SOP instance): SUCCESS when every copy we have is check_copy, else why not. Raises LookupFailed.

    The inbox comes first: what the intake takes away meanwhile has its row by then. Set aside is held, too.
    """
    found: dict[Reference, list[int]] = defaultdict(list)
    in_inbox = inbox_copies(site.inbox, {sop_uid for _, sop_uid in references})
    for reference in references:
        for path in in_inbox.get(reference[1], []):
            try:
                found[reference].append(check_copy(path, reference))
            except FileNotFoundError:
                continue
    rows = _rows(site.root / "ledger.db", {sop_uid for _, sop_uid in references})
    for reference in references:
        for sha256, original in rows.get(reference[1], []):
            reason = check_copy(site.root / "store" / original, reference, sha256)
            if reason == PROCESSING_FAILURE:
                log.error("store/%s is damaged: its bytes are not those that came in; let it be sent again", original)
            found[reference].append(reason)
    return [max(found[reference], default=NO_SUCH_INSTANCE) for reference in references]


def _rows(path: Path, sop_uids: set[str]) -> dict[str, list[tuple[str, str]]]:
    """(sha256, place in the store) of every row by SOP instance UID. Raises LookupFailed."""
    if not path.exists():  # nothing was ever taken in
        return {}
    sql = "SELECT sop_uid, sha256, original FROM image WHERE sop_uid IN (SELECT value FROM json_each(?))"
    try:
        connection = _open(path)
        try:
            found = connection.execute(sql, (json.dumps(sorted(sop_uids)),)).fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise LookupFailed(f"the ledger can't be read: {error}") from None
    rows: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for sop_uid, sha256, original in found:
        rows[sop_uid].append((sha256, original))
    return rows


def _open(path: Path) -> sqlite3.Connection:
    """A read-only connection. On a read-only mount SQLite needs the -shm file that a running agent keeps; without

    one nobody writes, the file alone is the ledger, and `immutable` reads it (a false answer is no danger: every
    image is checked against its hash on disk).
    """
    alone = not path.with_name(path.name + "-wal").exists()
    place = f"file:{quote(str(path))}?mode=ro"
    connection = sqlite3.connect(place, uri=True, timeout=BUSY_S)
    try:
        connection.execute("SELECT 1 FROM image LIMIT 1")
    except sqlite3.OperationalError:
        connection.close()
        if not alone:
            raise
        connection = sqlite3.connect(f"{place}&immutable=1", uri=True, timeout=BUSY_S)
    return connection
