"""How long images wait from reception to score."""

import numpy as np

from agent.ledger.database import Ledger


def received_to_scored(ledger: Ledger, newest: int = 200) -> tuple[float | None, float | None]:
    """Return median and 95th percentile, in seconds, over the newest predictions; (None, None) without any."""
    rows = ledger.rows(
        "SELECT (julianday(p.at) - julianday(i.received_at)) * 86400 AS s "
        "FROM (SELECT * FROM prediction ORDER BY id DESC LIMIT ?) p JOIN image i ON i.id = p.image",
        newest,
    )
    if not rows:
        return None, None
    seconds = np.array([row["s"] for row in rows])
    return round(float(np.median(seconds)), 3), round(float(np.percentile(seconds, 95)), 3)
