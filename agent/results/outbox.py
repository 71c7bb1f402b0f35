"""The outbox: one row per result (report or heatmap) for the PACS, written with the score.

Rows stay. A result that the PACS can't take now is retried; a result that the PACS refuses for good is kept and shown
in `status`. `agent.results.reporting` makes the objects and sends them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from agent.images.records import ImageRecord
from agent.ledger.database import Ledger, Row, utc, when
from agent.site.site import Site

LATE = timedelta(minutes=10)  # a result that waits longer is an alert


@dataclass(frozen=True)
class OutgoingResult:
    """One waiting row of the outbox, with its image and its score."""

    id: int
    kind: str  # "sr" (report) | "sc" (heatmap)
    image: ImageRecord
    bundle: str
    probabilities: dict[str, float]  # by finding
    scored_at: datetime
    heatmap: bytes | None  # .npy of uint8 [F, g, g], for "sc"
    attempts: int
    due: str
    why: str | None  # why the last attempt failed

    @classmethod
    def from_row(cls, row: Row) -> OutgoingResult:
        """Return the result of a row of the query in `due`."""
        return cls(
            id=row["result"],
            kind=row["kind"],
            image=ImageRecord.from_row(row),
            bundle=row["bundle"],
            probabilities=json.loads(row["probabilities"]),
            scored_at=when(row["scored_at"]),
            heatmap=row["heatmap"],
            attempts=row["attempts"],
            due=row["due"],
            why=row["why"],
        )


def enabled_kinds(site: Site) -> tuple[str, ...]:
    """Return the kinds of results that the settings switch on."""
    keys = site.config.results
    return tuple(kind for kind, on in (("sr", keys.sr), ("sc", keys.sc)) if on)


def queue(ledger: Ledger, image: int, bundle: str, kinds: tuple[str, ...], heatmap: bytes | None, at: str) -> None:
    """Queue the results of an image within the caller's transaction; queue them again if they were sent before.

    Heartbeats, rejected and quarantined images and superseded versions get no results. `heatmap`: see
    `agent.results.heatmap.pack`.
    """
    for kind in kinds:
        ledger.run(
            "INSERT INTO outbox (image, bundle, kind, state, heatmap, due, at) SELECT id, ?, ?, 'waiting', ?, ?, ? "
            "FROM image WHERE id = ? AND plate IS NOT NULL AND heartbeat = 0 AND superseded_by IS NULL "
            "ON CONFLICT (image, bundle, kind) DO UPDATE SET "
            "state = 'waiting', heatmap = excluded.heatmap, attempts = 0, due = excluded.due, at = excluded.at, "
            "why = NULL",
            bundle, kind, heatmap if kind == "sc" else None, at, at, image,
        )  # fmt: skip


def due(ledger: Ledger, now: datetime, limit: int) -> list[OutgoingResult]:
    """Return at most `limit` waiting results whose next attempt is due, the oldest first."""
    rows = ledger.rows(
        "SELECT i.*, o.id AS result, o.kind, o.bundle, o.heatmap, o.attempts, o.due, o.why, p.probabilities, "
        "p.at AS scored_at "
        "FROM outbox o INDEXED BY outbox_due JOIN image i ON i.id = o.image "  # thousands may wait: never sort them
        "JOIN prediction p ON p.image = o.image AND p.bundle = o.bundle "
        "WHERE o.state = 'waiting' AND o.due <= ? ORDER BY o.due, o.id LIMIT ?",
        utc(now), limit,
    )  # fmt: skip
    return [OutgoingResult.from_row(row) for row in rows]


def store_outcome(
    ledger: Ledger, result: OutgoingResult, state: str, why: str | None, now: datetime, retry_at: datetime
) -> None:
    """Store the outcome of an attempt: "sent", "failed", or "waiting" until `retry_at`."""
    with ledger.transaction():
        ledger.run(
            "UPDATE outbox SET state = ?, why = ?, attempts = ?, due = ?, sent_at = ?, "
            "heatmap = CASE WHEN ? = 'sent' THEN NULL ELSE heatmap END WHERE id = ? AND state = 'waiting'",
            state, why, result.attempts + 1, utc(retry_at) if state == "waiting" else result.due,
            utc(now) if state == "sent" else None, state, result.id,
        )  # fmt: skip


def store_reason(ledger: Ledger, result: OutgoingResult, why: str) -> None:
    """Store why a result still waits, without counting an attempt."""
    if result.why != why:
        with ledger.transaction():
            ledger.run("UPDATE outbox SET why = ? WHERE id = ?", why, result.id)


def state(ledger: Ledger) -> dict[str, Any]:
    """Return `{"waiting", "failed", "oldest"}`: two counts, and since when the oldest result waits."""
    counters = ledger.counters()
    return {
        "waiting": counters["outbox waiting"],
        "failed": counters["outbox failed"],
        "oldest": ledger.value("SELECT at FROM outbox WHERE state = 'waiting' ORDER BY at LIMIT 1"),
    }


def alerts(site: Site, ledger: Ledger, now: datetime) -> list[tuple[str, str, bool]]:
    """Return (kind, detail, degraded) for late results and for results that the PACS refused."""
    result_alerts: list[tuple[str, str, bool]] = []
    counts = state(ledger)
    if counts["oldest"] and now - when(counts["oldest"]) > LATE:
        why = ledger.value("SELECT why FROM outbox WHERE state = 'waiting' ORDER BY at LIMIT 1")
        why = why or ("not answered yet" if site.config.results.destination else "results.destination is not set")
        detail = f"{counts['waiting']} results wait for the PACS, the oldest since {counts['oldest']}: {why}"
        result_alerts.append(("results wait", detail, True))
    if counts["failed"]:
        newest = ledger.row("SELECT * FROM outbox WHERE state = 'failed' ORDER BY at DESC LIMIT 1") or {}
        detail = (
            f"{counts['failed']} results failed for good; the newest is of image {newest['image']}: {newest['why']}; "
            "remove the cause, then run `cxrloop images rerun --failed`"
        )
        result_alerts.append(("results refused", detail, False))
    return result_alerts
