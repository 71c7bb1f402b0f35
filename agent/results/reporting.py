"""From the score of an image to its report in the PACS, in the order in which it happens.

`score_waiting` scores images and queues their results in one transaction; `send_due` makes the objects of due results,
sends them and stores the answers. Each is one step: a loop calls it again, and a crash anywhere only repeats work.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import numpy as np
from pydicom import Dataset

from agent.errors import Problem
from agent.images.records import ImageRecord, read_plate
from agent.ledger.database import Ledger, utc
from agent.network import connections
from agent.results import heatmap, outbox
from agent.results.outbox import OutgoingResult
from agent.site import peer_address
from agent.site.site import Site
from deploy.bundle.bundle import Bundle, BundleRefused
from deploy.client import Client, ServerDown
from dicom.client.sender import NO_ANSWER, NO_ASSOCIATION, NO_CONTEXT, UNREADABLE, Sent, deliver
from dicom.dataset.facts import COMPREHENSIVE_SR, SECONDARY_CAPTURE
from dicom.dataset.part10 import HOSTILE, IMPLICIT_LE

SCORE_BATCH = 16  # images of one request: 4 MB, under a second on two cores
SEND_BATCH = 32  # results of one association: some seconds' work
CONTEXTS = ((COMPREHENSIVE_SR, IMPLICIT_LE), (SECONDARY_CAPTURE, IMPLICIT_LE))
FIRST_S, LONGEST_S = 2.0, 300.0  # back-off: doubled from the first to the longest
UNANSWERED = 3  # results in a row without an answer, 30 seconds each at worst: then the PACS is at fault, not a result


# Score


def score_waiting(site: Site, ledger: Ledger, client: Client) -> int:
    """Score at most SCORE_BATCH images, new ones first; return how many left the queue.

    0 means that no image waits, or that the model server is down or has no model: then the images keep waiting.
    """
    images = _queued(ledger, "unscored") or _queued(ledger, "score_again")
    if not images:
        return 0
    readable = _with_plates(site, ledger, images)
    if not readable:
        return len(images)
    kinds = outbox.enabled_kinds(site)
    plates = np.stack([plate for _, plate in readable])
    try:
        if "sc" in kinds:
            bundle, findings, probabilities, heatmaps = client.explain(plates)
        else:
            (bundle, findings, probabilities), heatmaps = client.predict(plates), None
    except ServerDown:
        return 0
    at = utc()
    with ledger.transaction():
        for n, (image, _) in enumerate(readable):
            scores = {finding: round(float(p), 6) for finding, p in zip(findings, probabilities[n], strict=True)}
            ledger.run(
                "INSERT OR IGNORE INTO prediction (image, bundle, probabilities, at) VALUES (?, ?, ?, ?)",
                image.id, bundle, json.dumps(scores), at,
            )  # fmt: skip
            packed = heatmap.pack(heatmaps[n]) if heatmaps is not None else None
            outbox.queue(ledger, image.id, bundle, kinds, packed, at)
            ledger.run("DELETE FROM score_again WHERE image = ?", image.id)
    return len(images)


def _queued(ledger: Ledger, table: str) -> list[ImageRecord]:
    """Return the oldest images of a queue (`unscored`, `score_again`)."""
    sql = f"SELECT image.* FROM {table} JOIN image ON image.id = {table}.image ORDER BY {table}.image LIMIT ?"
    return [ImageRecord.from_row(row) for row in ledger.rows(sql, SCORE_BATCH)]


def _with_plates(site: Site, ledger: Ledger, images: list[ImageRecord]) -> list[tuple[ImageRecord, np.ndarray]]:
    """Return the images whose plate can be read, each with its plate; take the others out of the queue."""
    readable: list[tuple[ImageRecord, np.ndarray]] = []
    for image in images:
        try:
            readable.append((image, read_plate(site, image)))
        except (FileNotFoundError, ValueError, EOFError):
            detail = (
                f"image {image.id}: its plate is lost or damaged, so the image is not scored; restore store/plates "
                f"from the backup, then run `cxrloop images rerun {image.id}`"
            )
            with ledger.transaction():
                ledger.insert("notice", kind="damaged", detail=detail, at=utc())
                for table in ("unscored", "score_again"):
                    ledger.run(f"DELETE FROM {table} WHERE image = ?", image.id)
    return readable


# Send


@dataclass
class PacsLink:
    """What one process remembers about sending to the PACS; it is not stored, so a restart tries at once."""

    draw: random.Random = field(default_factory=random.Random)
    failures: int = 0  # in a row
    paused_until: datetime | None = None
    bundles: dict[str, Bundle] = field(default_factory=dict)  # opened so far: opening a bundle hashes all of it

    def pause(self, now: datetime) -> None:
        """Send nothing for a while, longer after each failure."""
        self.failures += 1
        self.paused_until = now + back_off(self.failures, self.draw)


def back_off(failures: int, draw: random.Random) -> timedelta:
    """Return the time to the next attempt: doubled each time up to LONGEST_S, of which half is random.

    The random part keeps many appliances from calling one PACS at the same moment.
    """
    longest = min(LONGEST_S, FIRST_S * 2 ** min(failures - 1, 30))
    return timedelta(seconds=longest * draw.uniform(0.5, 1))


def send_due(site: Site, ledger: Ledger, link: PacsLink, now: datetime) -> int:
    """Send due results, at most SEND_BATCH over one association; return how many the PACS answered."""
    if not site.config.results.destination or (link.paused_until and now < link.paused_until):
        return 0
    results = outbox.due(ledger, now, SEND_BATCH)
    if not results:
        return 0
    pacs = peer_address.parse(site.config.results.destination)
    name = f"{pacs.aet}@{pacs.host}:{pacs.port}"
    in_delivery: list[OutgoingResult] = []  # at most one: `deliver` asks for the next object after each answer
    answered = unanswered = 0
    try:
        objects = _objects(site, ledger, link, results, in_delivery, now)
        context = connections.tls_context_to(site, pacs)
        for sent in deliver(
            objects, pacs.host, pacs.port, pacs.aet, site.config.node.aet, context, kinds=CONTEXTS
        ):  # fmt: skip
            result = in_delivery.pop()
            if sent.why == NO_ASSOCIATION:
                outbox.store_reason(ledger, result, f"{NO_ASSOCIATION} with {name}")
                link.pause(now)
                return answered
            _store_answer(ledger, link, result, *outcome_of(sent), now)
            if sent.why != NO_ANSWER:
                link.failures = unanswered = 0
                answered += 1
            elif (unanswered := unanswered + 1) == UNANSWERED:
                link.pause(now)
                return answered
    except (OSError, Problem) as error:  # no such host; or our certificate can't be used any more
        outbox.store_reason(ledger, results[0], f"{name}: {error}")
        link.pause(now)
    return answered


def _objects(
    site: Site, ledger: Ledger, link: PacsLink, results: list[OutgoingResult], in_delivery: list[OutgoingResult],
    now: datetime,
) -> Iterator[Dataset]:  # fmt: skip
    """Yield each result's object, with its result in `in_delivery`; store why an object can't be made."""
    from agent.results.result_objects import (  # highdicom: most of a second, not for every command
        HeaderIncomplete,
        make_object,
    )

    for result in results:
        try:
            made = make_object(site, result, link.bundles)
        except (Problem, BundleRefused, HeaderIncomplete) as error:
            _store_answer(ledger, link, result, "failed", str(error), now)
        except FileNotFoundError:
            _store_answer(ledger, link, result, "failed", "the original or its plate is not in the store", now)
        except OSError as error:  # a bad block, or too many open files: retry later, send the others meanwhile
            why = f"the original or its plate can't be read: {error.strerror}"
            _store_answer(ledger, link, result, "waiting", why, now)
        except HOSTILE as error:  # an odd image must not stop the others; its values must not enter the reason
            _store_answer(ledger, link, result, "failed", f"can't be made: {type(error).__name__}", now)
        else:
            in_delivery.append(result)
            yield made


def outcome_of(sent: Sent) -> tuple[str, str | None]:
    """Return ("sent" | "failed" | "waiting", why) of an answer, by PS3.4 table B.2-1 and PS3.7 annex C."""
    status = sent.status
    if status is None:
        return ("failed" if sent.why in (NO_CONTEXT, UNREADABLE) else "waiting"), sent.why
    text = f"status {status:04X}"
    if status == 0 or status == 0x0111:  # Success; or the PACS has this very object, and its answer was lost
        return "sent", None
    if status >> 12 == 0xB:  # stored, with a warning
        return "sent", text
    # does not match its class, can't be understood, class not supported, instance invalid, not authorised: for good
    refused = status >> 12 == 0xC or status >> 8 == 0xA9 or status in (0x0117, 0x0122, 0x0124)
    return ("failed" if refused else "waiting"), text


def _store_answer(
    ledger: Ledger, link: PacsLink, result: OutgoingResult, state: str, why: str | None, now: datetime
) -> None:
    """Store the outcome of an attempt; a result that waits is retried after a back-off of its own."""
    outbox.store_outcome(ledger, result, state, why, now, retry_at=now + back_off(result.attempts + 1, link.draw))
