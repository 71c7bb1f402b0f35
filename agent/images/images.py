"""Images as a person or a script reads them: one row each, newest first."""

import json
from datetime import UTC, datetime
from typing import Any

from agent.errors import Problem
from agent.ledger import audit
from agent.ledger.database import Ledger, image_number, utc
from agent.site.site import Site

STATES = ("received", "stored", "predicted", "returned", "labelled", "rejected", "quarantined")
SCORABLE = ("stored", "predicted", "returned", "labelled")


def ls(site: Site, ledger: Ledger, state: str | None, limit: int) -> list[dict[str, Any]]:
    """The newest images, in one state or in all; `received` are the files that wait in the inbox."""
    waiting = _received(site, limit) if state in (None, "received") else []
    if state == "received":
        return waiting
    rows = ledger.rows(
        "SELECT i.*, p.probabilities, p.bundle FROM image i "
        "LEFT JOIN prediction p ON p.id = (SELECT max(id) FROM prediction WHERE image = i.id) "
        f"{'WHERE i.state = ?' if state else ''} ORDER BY i.id DESC LIMIT ?",
        *([state] if state else []), limit - len(waiting),
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
            "dropped_at": row["dropped_at"],
        }
        for row in rows
    ]


def rerun(ledger: Ledger, uid: str | None, state: str | None, failed: bool, by: str) -> dict[str, int]:
    """`{"images", "results"}`: images to be scored and answered once more, refused results to be sent once more.

    One of: `uid` (SOP Instance UID or image number), `state` (all images in it), `failed` (what the PACS refused, as it
    is). New images keep going first. Raises Problem for an unknown image, one that was set aside, and a state without scores.
    """
    if sum((uid is not None, state is not None, failed)) != 1:
        raise Problem("studies rerun: give one of UID, --state or --failed")
    if state and state not in SCORABLE:
        raise Problem(f"--state {state}: images are scored again in one of {', '.join(SCORABLE)}")
    image = _image(ledger, uid) if uid is not None else None
    with ledger.transaction():
        before = ledger.counters()["outbox waiting"]
        if not failed:
            ledger.run(
                "INSERT OR IGNORE INTO score_again SELECT id FROM image WHERE (id = ? OR state = ?) "
                "AND plate IS NOT NULL AND heartbeat = 0 AND superseded_by IS NULL",
                image, state,
            )  # fmt: skip
        images = 0 if failed else ledger.value("SELECT changes()")
        ledger.run(
            "UPDATE outbox SET state = 'waiting', attempts = 0, due = ?1, at = ?1, why = NULL WHERE state = 'failed' "
            "AND (?2 OR image IN (SELECT image FROM score_again))",
            utc(), failed,
        )  # fmt: skip
        results = ledger.counters()["outbox waiting"] - before
        asked = f"image {image}" if image else f"state {state}" if state else "failed results"
        audit.append(ledger, by, "studies rerun", asked, after={"images": images, "results": results})
    return {"images": images, "results": results}


def _image(ledger: Ledger, uid: str) -> int:
    row = ledger.row(
        "SELECT * FROM image WHERE sop_uid = ? OR id = ? ORDER BY plate IS NULL, superseded_by IS NOT NULL, id DESC LIMIT 1",
        uid, image_number(uid),
    )  # fmt: skip
    if not row:
        raise Problem(f"studies rerun {uid}: no image with this SOP Instance UID or image number")
    if row["plate"] is None:
        raise Problem(f"studies rerun {uid}: {row['state']}, so it is never scored ({row['reason']})")
    if row["heartbeat"]:
        raise Problem(f"studies rerun {uid}: a heartbeat image, whose results go nowhere")
    return row["id"]


def _received(site: Site, limit: int) -> list[dict[str, Any]]:
    empty = dict.fromkeys(
        (
            "image",
            "sop_uid",
            "study_uid",
            "patient_key",
            "reason",
            "view",
            "range",
            "bundle",
            "superseded_by",
            "dropped_at",
        )
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
