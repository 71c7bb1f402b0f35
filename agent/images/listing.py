"""`cxrloop images ls`: the images of the site, one entry each, newest first."""

import json
from datetime import UTC, datetime
from typing import Any

from agent.ledger.database import Ledger, utc
from agent.site.site import Site

STATES = ("received", "stored", "predicted", "returned", "labelled", "rejected", "quarantined")
SCORABLE = ("stored", "predicted", "returned", "labelled")
COLUMNS = (
    "sop_uid", "study_uid", "patient_key", "state", "reason", "view", "range", "received_at", "bundle", "file",
    "superseded_by", "dropped_at",
)  # fmt: skip


def newest(site: Site, ledger: Ledger, state: str | None, limit: int) -> list[dict[str, Any]]:
    """Return at most `limit` images, in one state or in all; images in state `received` wait in the inbox."""
    received = _received(site, limit) if state in (None, "received") else []
    if state == "received":
        return received
    rows = ledger.rows(
        "SELECT i.*, p.probabilities, p.bundle FROM image i "
        "LEFT JOIN prediction p ON p.id = (SELECT max(id) FROM prediction WHERE image = i.id) "
        f"{'WHERE i.state = ?' if state else ''} ORDER BY i.id DESC LIMIT ?",
        *([state] if state else []), limit - len(received),
    )  # fmt: skip
    return received + [
        {
            "image": row["id"],
            **{name: row[name] for name in COLUMNS},
            "predictions": json.loads(row["probabilities"]) if row["probabilities"] else {},
        }
        for row in rows
    ]


def _received(site: Site, limit: int) -> list[dict[str, Any]]:
    """Return the files that wait in the inbox; nothing of them is known but when they came."""
    return [
        {
            "image": None,
            **dict.fromkeys(COLUMNS),
            "state": "received",
            "received_at": utc(datetime.fromtimestamp(path.stat().st_mtime, UTC)),
            "predictions": {},
        }
        for path in site.inbox.waiting(limit)
    ]
