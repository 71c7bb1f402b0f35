"""Raw pixels as the floor of an evaluation: a logistic regression fitted on the site's labelled train images."""

import numpy as np

from agent.ledger.database import Ledger
from agent.site.site import Site
from learner.evaluation import floor
from learner.evaluation.verdict import Scores

LABELLED = """
  SELECT plate, finding, value FROM image JOIN label_now ON label_now.image = image.id
  WHERE range = 'train' AND plate IS NOT NULL AND heartbeat = 0 AND superseded_by IS NULL AND value IS NOT NULL
"""


def score(site: Site, ledger: Ledger, plates: list[str]) -> Scores:
    """Return the floor's probabilities float [N, F] on N plates of the store; nan where train labels lack a class."""
    known = [row for row in ledger.rows(LABELLED) if row["finding"] in site.findings]
    train = sorted({row["plate"] for row in known})
    place = {plate: number for number, plate in enumerate(train)}
    labels = np.full((len(train), len(site.findings)), np.nan)
    for row in known:
        labels[place[row["plate"]], site.findings.index(row["finding"])] = row["value"]
    return floor.scores(_thumbnails(site, train), labels, _thumbnails(site, plates), site.findings)


def _thumbnails(site: Site, plates: list[str]) -> np.ndarray:
    return floor.thumbnails(
        len(plates), lambda low, high: np.stack([site.store.plate(plate) for plate in plates[low:high]])
    )
