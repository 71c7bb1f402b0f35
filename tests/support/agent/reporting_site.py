"""A site that reports to a PACS: images taken in and scored, and a link to the PACS that was not used yet."""

import random
from contextlib import contextmanager
from datetime import UTC, datetime

from agent.results import reporting
from tests.conftest import make_site
from tests.support.agent.images import put, take_in, xray
from tests.support.agent.models import FINDINGS, InProcessServer, add_model

NOW = datetime(2030, 1, 1, tzinfo=UTC)  # later than every `due` that a test writes


def make_reporting_site(folder, port):
    """Return a site that sends SR and SC to PACS@127.0.0.1:port, with one image and a first model in service."""
    site = make_site(
        folder,
        site={"findings": list(FINDINGS)},
        results={"sr": True, "sc": True, "destination": f"PACS@127.0.0.1:{port}"},
    )
    with site.ledger() as ledger:
        put(site, xray(0))
        take_in(site, ledger)
        add_model(site, ledger, 1)
    return site


@contextmanager
def scored_images(site, images=1, first=100):
    """Yield (ledger, unused link) of a site with so many scored images."""
    with site.ledger() as ledger:
        for seed in range(first, first + images - 1):
            put(site, xray(seed), f"{seed}.dcm")
        take_in(site, ledger)
        score_all(site, ledger)
        yield ledger, reporting.PacsLink(random.Random(1))


def score_all(site, ledger):
    """Score until no image waits."""
    while reporting.score_waiting(site, ledger, InProcessServer(site, ledger)):  # type: ignore[arg-type]
        pass


def outbox_states(ledger):
    """Return (kind, state) of every row of the outbox, in order."""
    return [(row["kind"], row["state"]) for row in ledger.rows("SELECT * FROM outbox ORDER BY id")]
