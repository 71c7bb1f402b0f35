"""Films as a person or a script reads them: one row each, newest first."""

import json
from datetime import UTC, datetime
from typing import Any

from agent.ledger import Ledger, utc
from agent.site import Site

STATES = ("received", "stored", "predicted", "returned", "labelled", "rejected", "quarantined")


def ls(site: Site, ledger: Ledger, state: str | None, limit: int) -> list[dict[str, Any]]:
    """The newest films, in one state or in all; `received` are the files that wait in the inbox."""
    waiting = _received(site, limit) if state in (None, "received") else []
    if state == "received":
        return waiting
    rows = ledger.rows(
        "SELECT i.*, p.probabilities, p.bundle FROM image i "
        "LEFT JOIN prediction p ON p.id = (SELECT max(id) FROM prediction WHERE image = i.id) "
        "WHERE (? IS NULL OR i.state = ?) ORDER BY i.id DESC LIMIT ?",
        state, state, limit - len(waiting),
    )  # fmt: skip
    return waiting + [
        {
            "image": row["id"],
            "sop_uid": row["sop_uid"],
            "study_uid": row["study_uid"],
            "patient_key": row["patient_key"],
            "state": row["state"],
            "reason": row["reason"],
            "view": row["view"],
            "range": row["range"],
            "received_at": row["received_at"],
            "predictions": json.loads(row["probabilities"]) if row["probabilities"] else {},
            "bundle": row["bundle"],
            "file": row["file"],
            "superseded_by": row["superseded_by"],
        }
        for row in rows
    ]


def _received(site: Site, limit: int) -> list[dict[str, Any]]:
    empty = dict.fromkeys(
        ("image", "sop_uid", "study_uid", "patient_key", "reason", "view", "range", "bundle", "superseded_by")
    )
    return [
        {
            **empty,
            "state": "received",
            "received_at": utc(datetime.fromtimestamp(path.stat().st_mtime, UTC)),
            "predictions": {},
            "file": None,
        }
        for path in site.inbox.waiting(limit)
    ]
