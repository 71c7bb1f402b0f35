"""`cxrloop images rerun`: queue images to be scored again, and refused results to be sent again."""

from agent.errors import Problem
from agent.images.listing import SCORABLE
from agent.ledger import audit
from agent.ledger.database import Ledger, image_number, utc


def rerun(ledger: Ledger, uid: str | None, state: str | None, failed: bool, by: str) -> dict[str, int]:
    """Queue images for a new score, and refused results for a new attempt; return `{"images", "results"}`.

    Exactly one of: `uid` (SOP Instance UID or image number), `state` (all images in this state), `failed` (all refused
    results, unchanged). New images are still scored first. Raises Problem for an unknown image, an image without plate,
    and a state without scores.
    """
    if sum((uid is not None, state is not None, failed)) != 1:
        raise Problem("images rerun: give one of UID, --state or --failed")
    if state and state not in SCORABLE:
        raise Problem(f"--state {state}: images are scored again in one of {', '.join(SCORABLE)}")
    image = _scorable_image(ledger, uid) if uid is not None else None
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
        selection = f"image {image}" if image else f"state {state}" if state else "failed results"
        audit.append(ledger, by, "images rerun", selection, after={"images": images, "results": results})
    return {"images": images, "results": results}


def _scorable_image(ledger: Ledger, uid: str) -> int:
    """Return the number of the image that a UID or a number names; raises Problem when it can't be scored."""
    row = ledger.row(
        "SELECT * FROM image WHERE sop_uid = ? OR id = ? "
        "ORDER BY plate IS NULL, superseded_by IS NOT NULL, id DESC LIMIT 1",
        uid, image_number(uid),
    )  # fmt: skip
    if not row:
        raise Problem(f"images rerun {uid}: no image with this SOP Instance UID or image number")
    if row["plate"] is None:
        raise Problem(f"images rerun {uid}: {row['state']}, so it is never scored ({row['reason']})")
    if row["heartbeat"]:
        raise Problem(f"images rerun {uid}: a heartbeat image; its results are not sent")
    return row["id"]
