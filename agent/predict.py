"""Scores every stored film that has no score, oldest first: the new ones and the backlog alike.

Asks `deploy.server` over loopback; when it is not up or has no model, the films simply wait.
"""

import json

import numpy as np

from agent.ledger import Ledger, utc
from agent.site import Site
from deploy.client import Client, ServerDown

BATCH = 16  # films of one request: 4 MB, under a second on two cores


def step(site: Site, ledger: Ledger, client: Client) -> int:
    """Score at most BATCH waiting films; how many were scored (0 when there is nothing, or nobody, to ask)."""
    waiting = ledger.rows(
        "SELECT image.id, plate FROM unscored JOIN image ON image.id = unscored.image ORDER BY unscored.image LIMIT ?",
        BATCH,
    )
    if not waiting:
        return 0
    plates = np.stack([site.store.plate(row["plate"]) for row in waiting])
    try:
        bundle, findings, probabilities = client.predict(plates)
    except ServerDown:
        return 0
    at = utc()
    with ledger.transaction():
        for row, scores in zip(waiting, probabilities, strict=True):
            named = {name: round(float(p), 6) for name, p in zip(findings, scores, strict=True)}
            ledger.run(
                "INSERT OR IGNORE INTO prediction (image, bundle, probabilities, at) VALUES (?, ?, ?, ?)",
                row["id"],
                bundle,
                json.dumps(named),
                at,
            )
    return len(waiting)


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
