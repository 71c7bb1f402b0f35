"""Storage commitment: whether this site holds an image, byte for byte, in the inbox or in the store.

Reads only, and works on a read-only mount: the listener's systemd unit may write nothing but the inbox.
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


def check(site: Site, references: list[Reference]) -> list[int]:
    """Return for each (SOP class, SOP instance) SUCCESS when all its copies are intact, else the failure reason.

    Rejected and quarantined images count as held. The inbox is checked first: an image that the intake takes in during
    the check is then found in the ledger. Raises LookupFailed.
    """
    outcomes: dict[Reference, list[int]] = defaultdict(list)
    in_inbox = inbox_copies(site.inbox, {sop_uid for _, sop_uid in references})
    for reference in references:
        for path in in_inbox.get(reference[1], []):
            try:
                outcomes[reference].append(check_copy(path, reference))
            except FileNotFoundError:
                continue
    rows = _stored_copies(site.root / "ledger.db", {sop_uid for _, sop_uid in references})
    for reference in references:
        for sha256, original in rows.get(reference[1], []):
            outcome = check_copy(site.root / "store" / original, reference, sha256)
            if outcome == PROCESSING_FAILURE:
                log.error("store/%s is damaged: its bytes differ from those received; send the image again", original)
            outcomes[reference].append(outcome)
    return [max(outcomes[reference], default=NO_SUCH_INSTANCE) for reference in references]


def _stored_copies(path: Path, sop_uids: set[str]) -> dict[str, list[tuple[str, str]]]:
    """Return (sha256, place in the store) of every row by SOP Instance UID; raises LookupFailed."""
    if not path.exists():  # nothing was ever taken in
        return {}
    sql = "SELECT sop_uid, sha256, original FROM image WHERE sop_uid IN (SELECT value FROM json_each(?))"
    try:
        connection = _open_read_only(path)
        try:
            rows = connection.execute(sql, (json.dumps(sorted(sop_uids)),)).fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise LookupFailed(f"the ledger can't be read: {error}") from None
    copies: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for sop_uid, sha256, original in rows:
        copies[sop_uid].append((sha256, original))
    return copies


def _open_read_only(path: Path) -> sqlite3.Connection:
    """Open the ledger for reading, also on a read-only mount.

    There SQLite needs the -shm file of a running agent. Without an agent nobody writes, the file alone is the ledger,
    and `immutable` reads it. An outdated row does no harm: each image is checked against its hash on disk.
    """
    alone = not path.with_name(path.name + "-wal").exists()
    uri = f"file:{quote(str(path))}?mode=ro"
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_S)
    try:
        connection.execute("SELECT 1 FROM image LIMIT 1")
    except sqlite3.OperationalError:
        connection.close()
        if not alone:
            raise
        connection = sqlite3.connect(f"{uri}&immutable=1", uri=True, timeout=BUSY_S)
    return connection
