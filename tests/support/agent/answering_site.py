"""A site that answers the PACS, for tests: images taken in and scored, and a line to the PACS that was never used."""

import random
from contextlib import contextmanager
from datetime import UTC, datetime

from agent.results import reporting
from tests.conftest import make_site
from tests.support.agent.images import put, take_in, xray
from tests.support.agent.models import FINDINGS, InProcessServer, add_model

NOW = datetime(2030, 1, 1, tzinfo=UTC)  # after every real `due` of the rows


def an_answering_site(folder, port):
    """A site that answers with SR and SC, with an image and a first model in service."""
    made = make_site(
        folder,
        site={"findings": list(FINDINGS)},
        results={"sr": True, "sc": True, "destination": f"PACS@127.0.0.1:{port}"},
    )
    with made.ledger() as ledger:
        put(made, xray(0))
        take_in(made, ledger)
        add_model(made, ledger, 1)
    return made


@contextmanager
def answering(site, images=1, first=100):
    """The site's ledger with so many images taken in and scored, and a line that was never used."""
    with site.ledger() as ledger:
        for seed in range(first, first + images - 1):
            put(site, xray(seed), f"{seed}.dcm")
        take_in(site, ledger)
        score(site, ledger)
        yield ledger, reporting.PacsLink(random.Random(1))


def score(site, ledger):
    while reporting.score_waiting(site, ledger, InProcessServer(site, ledger)):  # type: ignore[arg-type]
        pass


def states(ledger):
    return [(row["kind"], row["state"]) for row in ledger.rows("SELECT * FROM outbox ORDER BY id")]
