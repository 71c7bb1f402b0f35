"""The nightly window, "HH:MM-HH:MM" in the site's time zone. Windows may pass midnight and a clock change."""

from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo


def window_at(now: datetime, window: str, tz: ZoneInfo) -> tuple[datetime, datetime] | None:
    """Return start and end (UTC) of the window that contains `now`, or None."""
    for start, end in _windows(now, window, tz, days=(-1, 0)):
        if start <= now < end:
            return start, end
    return None


def next_window(now: datetime, window: str, tz: ZoneInfo) -> datetime | None:
    """Return the start (UTC) of the next window after `now`, or None when there is no window."""
    return next((start for start, _ in _windows(now, window, tz, days=(-1, 0, 1, 2)) if start > now), None)


def _windows(now: datetime, window: str, tz: ZoneInfo, days: tuple[int, ...]) -> list[tuple[datetime, datetime]]:
    if not window:
        return []
    start, end = (time.fromisoformat(text) for text in window.split("-"))
    today = now.astimezone(tz).date()
    windows = []
    for day in (today + timedelta(days=n) for n in days):
        last = day + timedelta(days=1) if end <= start else day
        # Through UTC and back: a wall-clock time that the spring change skips becomes the one after it.
        a, b = (datetime.combine(d, t, tz).astimezone(UTC) for d, t in ((day, start), (last, end)))
        windows.append((a, b))
    return windows
