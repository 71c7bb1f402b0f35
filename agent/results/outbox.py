"""What the PACS is still to be told: a row a result, written with the score, sent until the PACS has said Success.

Nothing is ever dropped: what the PACS can't take now is tried again, what it refuses for good is kept and shown.
What the objects hold is `answers`; how they travel is the sender's.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from pydicom import Dataset

from agent.errors import Problem
from agent.ledger.database import Ledger, Row, utc, when
from agent.network import connections
from agent.site import peer_address
from agent.site.site import Site
from deploy.bundle.bundle import Bundle
from deploy.errors import BundleRefused
from dicom.client.sender import NO_ANSWER, NO_ASSOCIATION, NO_CONTEXT, UNREADABLE, Sent, deliver
from dicom.dataset.facts import COMPREHENSIVE_SR, SECONDARY_CAPTURE
from dicom.dataset.part10 import HOSTILE, IMPLICIT_LE

KINDS = {"sr": (COMPREHENSIVE_SR, IMPLICIT_LE), "sc": (SECONDARY_CAPTURE, IMPLICIT_LE)}
BATCH = 32  # results of one association: some seconds' work
FIRST_S, LONGEST_S = 2.0, 300.0  # back-off: doubled from one to the other
SILENCES = 3  # results in a row without an answer, 30 seconds each at worst: then it is the PACS, not they
LATE = timedelta(minutes=10)  # after that a waiting result is an alert


@dataclass
class Line:
    """The way to the PACS as this process knows it: a start tries at once, whatever was before."""

    site: Site
    draw: random.Random = field(default_factory=random.Random)
    failures: int = 0
    shut_until: datetime | None = None
    bundles: dict[str, Bundle] = field(default_factory=dict)  # seen so far: opening one hashes all of it

    def failed(self, now: datetime) -> None:
        self.failures += 1
        self.shut_until = now + back_off(self.failures, self.draw)


def back_off(failures: int, draw: random.Random) -> timedelta:
    """Time to the next try: doubled each time up to LONGEST_S, of which a random half (many appliances, one PACS)."""
    longest = min(LONGEST_S, FIRST_S * 2 ** min(failures - 1, 30))
    return timedelta(seconds=longest * draw.uniform(0.5, 1))


def kinds(site: Site) -> tuple[str, ...]:
    """The results that are switched on."""
    keys = site.config.results
    return tuple(kind for kind, on in (("sr", keys.sr), ("sc", keys.sc)) if on)


def put(ledger: Ledger, image: int, bundle: str, wanted: tuple[str, ...], heat: bytes | None, at: str) -> None:
    """Queue the results of an image, inside the transaction of its score; again, if they were sent before.

    Heartbeats, images set aside and versions that were corrected get none. `heat`: the image's maps, packed.
    """
    for kind in wanted:
        ledger.run(
            "INSERT INTO outbox (image, bundle, kind, state, heatmap, due, at) SELECT id, ?, ?, 'waiting', ?, ?, ? "
            "FROM image WHERE id = ? AND plate IS NOT NULL AND heartbeat = 0 AND superseded_by IS NULL "
            "ON CONFLICT (image, bundle, kind) DO UPDATE SET "
            "state = 'waiting', heatmap = excluded.heatmap, attempts = 0, due = excluded.due, at = excluded.at, why = NULL",
            bundle, kind, heat if kind == "sc" else None, at, at, image,
        )  # fmt: skip


def step(site: Site, ledger: Ledger, line: Line, now: datetime) -> int:
    """Send what is due, at most BATCH results over one association; how many the PACS answered."""
    if not site.config.results.destination or (line.shut_until and now < line.shut_until):
        return 0
    due = ledger.rows(
        "SELECT o.*, p.probabilities, p.at AS scored_at, i.sha256, i.original, i.plate, i.reason, i.dropped_at "
        "FROM outbox o INDEXED BY outbox_due JOIN image i ON i.id = o.image "  # thousands may wait: never sort them
        "JOIN prediction p ON p.image = o.image AND p.bundle = o.bundle "
        "WHERE o.state = 'waiting' AND o.due <= ? ORDER BY o.due, o.id LIMIT ?",
        utc(now), BATCH,
    )  # fmt: skip
    if not due:
        return 0
    peer = peer_address.parse(site.config.results.destination)
    answered = silences = 0
    under_way: list[Row] = []
    try:
        context = connections.wire(site, peer)
        for sent in deliver(
            _objects(line, ledger, due, under_way, now), peer.host, peer.port, peer.aet, site.config.node.aet, context,
            kinds=KINDS.values(),
        ):  # fmt: skip
            row = under_way.pop()
            if sent.why == NO_ASSOCIATION:
                return answered + _away(line, ledger, row, f"{NO_ASSOCIATION} with {_named(peer)}", now)
            _move(ledger, row, *judged(sent), now, line)
            if sent.why != NO_ANSWER:
                line.failures = silences = 0
                answered += 1
            elif (silences := silences + 1) == SILENCES:
                line.failed(now)
                return answered
    except (OSError, Problem) as error:  # no such host; or our certificate has gone bad
        return answered + _away(line, ledger, due[0], f"{_named(peer)}: {error}", now)
    return answered


def _named(peer: peer_address.Peer) -> str:
    return f"{peer.aet}@{peer.host}:{peer.port}"


def judged(sent: Sent) -> tuple[str, str | None]:
    """("sent" | "failed" | "waiting", why) of an answer, by PS3.4 table B.2-1 and PS3.7 annex C."""
    status = sent.status
    if status is None:
        return ("failed" if sent.why in (NO_CONTEXT, UNREADABLE) else "waiting"), sent.why
    said = f"status {status:04X}"
    if status == 0 or status == 0x0111:  # Success; or it has this very object, whose answer we never got
        return "sent", None
    if status >> 12 == 0xB:  # stored, with a warning
        return "sent", said
    # does not match its class, can't be understood, class not supported, instance invalid, not authorised: for good
    refused = status >> 12 == 0xC or status >> 8 == 0xA9 or status in (0x0117, 0x0122, 0x0124)
    return ("failed" if refused else "waiting"), said


def _move(ledger: Ledger, row: Row, state: str, why: str | None, now: datetime, line: Line) -> None:
    attempts = row["attempts"] + 1
    due = utc(now + back_off(attempts, line.draw)) if state == "waiting" else row["due"]
    with ledger.transaction():
        ledger.run(
            "UPDATE outbox SET state = ?, why = ?, attempts = ?, due = ?, sent_at = ?, "
            "heatmap = CASE WHEN ? = 'sent' THEN NULL ELSE heatmap END WHERE id = ? AND state = 'waiting'",
            state, why, attempts, due, utc(now) if state == "sent" else None, state, row["id"],
        )  # fmt: skip


def _away(line: Line, ledger: Ledger, row: Row, why: str, now: datetime) -> int:
    """Nobody there: one row keeps the reason for status, and the whole line waits, not the row."""
    line.failed(now)
    if row["why"] != why:
        with ledger.transaction():
            ledger.run("UPDATE outbox SET why = ? WHERE id = ?", why, row["id"])
    return 0


def _objects(line: Line, ledger: Ledger, rows: list[Row], under_way: list[Row], now: datetime) -> Iterator[Dataset]:
    """Each row's object, its row in `under_way`; a row whose object can't be made is marked and passed over."""
    from agent.results.objects import (  # highdicom takes most of a second to import: not for every `status`
        HeaderIncomplete,
        make,
    )

    for row in rows:
        try:
            made = make(line.site, row, line.bundles)
        except (Problem, BundleRefused, HeaderIncomplete) as error:
            _move(ledger, row, "failed", str(error), now, line)
        except FileNotFoundError:
            _move(ledger, row, "failed", "the original or its plate is not in the store", now, line)
        except OSError as error:  # a bad block, or too many files open: later, and the others meanwhile
            _move(ledger, row, "waiting", f"the original or its plate can't be read: {error.strerror}", now, line)
        except HOSTILE as error:  # one odd image must not keep the others; its values stay out of the reason
            _move(ledger, row, "failed", f"can't be made: {type(error).__name__}", now, line)
        else:
            under_way.append(row)
            yield made


def state(ledger: Ledger) -> dict[str, Any]:
    """`{"waiting", "failed", "oldest"}`: counters, and since when the oldest result waits."""
    counters = ledger.counters()
    return {
        "waiting": counters["outbox waiting"],
        "failed": counters["outbox failed"],
        "oldest": ledger.value("SELECT at FROM outbox WHERE state = 'waiting' ORDER BY at LIMIT 1"),
    }


def alerts(site: Site, ledger: Ledger, now: datetime) -> list[tuple[str, str, bool]]:
    """What status says of results that are late, and of those that the PACS refused."""
    found = []
    held = state(ledger)
    if held["oldest"] and now - when(held["oldest"]) > LATE:
        why = ledger.value("SELECT why FROM outbox WHERE state = 'waiting' ORDER BY at LIMIT 1")
        where = why or ("no results.destination is set" if not site.config.results.destination else "not yet answered")
        found.append(("results wait", f"{held['waiting']}, the oldest since {held['oldest']}: {where}", True))
    if held["failed"]:
        last = ledger.row("SELECT * FROM outbox WHERE state = 'failed' ORDER BY at DESC LIMIT 1") or {}
        detail = (
            f"{held['failed']}; the newest, of image {last['image']}: {last['why']}; mend the cause, then "
            "`cxrloop studies rerun --failed`"
        )
        found.append(("results refused", detail, False))
    return found
