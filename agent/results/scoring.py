"""Scores every stored image that has no score, oldest first: the new ones and the backlog alike; then the ones to redo.

Asks `deploy.server.server` over loopback; when it is not up or has no model, the images simply wait. Where results are sent to
the PACS, the rows of the outbox are written with the score: both or neither.
"""

import io
import json

import numpy as np

from agent.ledger.database import Ledger, Row, utc
from agent.results import outbox
from agent.site.site import Site
from deploy.client import Client
from deploy.errors import ServerDown

BATCH = 16  # images of one request: 4 MB, under a second on two cores


def step(site: Site, ledger: Ledger, client: Client) -> int:
    """Score at most BATCH waiting images; how many left the line (0 when there is nothing, or nobody, to ask)."""
    queued = _waiting(ledger, "unscored") or _waiting(ledger, "score_again")
    if not queued:
        return 0
    waiting, plates = _read(site, ledger, queued)
    if not waiting:
        return len(queued)
    kinds = outbox.kinds(site)
    try:
        if "sc" in kinds:
            bundle, findings, probabilities, maps = client.explain(np.stack(plates))
        else:
            (bundle, findings, probabilities), maps = client.predict(np.stack(plates)), None
    except ServerDown:
        return 0
    at = utc()
    with ledger.transaction():
        for n, (row, scores) in enumerate(zip(waiting, probabilities, strict=True)):
            named = {name: round(float(p), 6) for name, p in zip(findings, scores, strict=True)}
            ledger.run(
                "INSERT OR IGNORE INTO prediction (image, bundle, probabilities, at) VALUES (?, ?, ?, ?)",
                row["id"],
                bundle,
                json.dumps(named),
                at,
            )
            outbox.put(ledger, row["id"], bundle, kinds, pack(maps[n]) if maps is not None else None, at)
            ledger.run("DELETE FROM score_again WHERE image = ?", row["id"])
    return len(queued)


def _read(site: Site, ledger: Ledger, queued: list[Row]) -> tuple[list[Row], list[np.ndarray]]:
    """The images whose plate can be read, with it. One whose plate is lost leaves the line, or none behind it were scored."""
    found: list[tuple[Row, np.ndarray]] = []
    for row in queued:
        try:
            found.append((row, site.store.plate(row["plate"])))
        except (FileNotFoundError, ValueError, EOFError):
            detail = (
                f"image {row['id']}: its plate is lost or damaged, so it is not scored; restore store/plates from the "
                f"backup, then `cxrloop studies rerun {row['id']}`"
            )
            with ledger.transaction():
                ledger.insert("notice", kind="damaged", detail=detail, at=utc())
                for table in ("unscored", "score_again"):
                    ledger.run(f"DELETE FROM {table} WHERE image = ?", row["id"])
    return [row for row, _ in found], [plate for _, plate in found]


def _waiting(ledger: Ledger, table: str) -> list[Row]:
    return ledger.rows(
        f"SELECT image.id, plate FROM {table} JOIN image ON image.id = {table}.image ORDER BY {table}.image LIMIT ?",
        BATCH,
    )


def pack(heat: np.ndarray) -> bytes:
    """.npy of uint8 [F, g, g] from float [F, g, g]: what speaks for each finding, over its own largest value."""
    speaks_for = np.nan_to_num(heat).clip(min=0)
    scaled = speaks_for / np.maximum(speaks_for.max((1, 2), keepdims=True), np.finfo(np.float32).tiny)
    body = io.BytesIO()
    np.save(body, np.round(scaled * 255).astype(np.uint8), allow_pickle=False)
    return body.getvalue()


def latency(ledger: Ledger, last: int = 200) -> tuple[float | None, float | None]:
    """Median and 95th percentile of seconds from received to scored, over the newest predictions."""
    rows = ledger.rows(
        "SELECT (julianday(p.at) - julianday(i.received_at)) * 86400 AS s "
        "FROM (SELECT * FROM prediction ORDER BY id DESC LIMIT ?) p JOIN image i ON i.id = p.image",
        last,
    )
    if not rows:
        return None, None
    seconds = np.array([row["s"] for row in rows])
    return round(float(np.median(seconds)), 3), round(float(np.percentile(seconds, 95)), 3)
