"""How long images wait from reception to score."""

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
    seconds = sorted(row["s"] for row in rows)
    return round(_quantile(seconds, 0.5), 3), round(_quantile(seconds, 0.95), 3)


def _quantile(values: list[float], share: float) -> float:
    """Return the quantile of sorted values, interpolated linearly as numpy does."""
    place = share * (len(values) - 1)
    below, above = values[int(place)], values[min(int(place) + 1, len(values) - 1)]
    return below + (above - below) * (place - int(place))
