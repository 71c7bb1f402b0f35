"""Raw pixels as the floor of an evaluation: a logistic regression fitted on the site's labelled train images."""

import numpy as np

from agent.ledger.database import Ledger
from agent.rounds import planning
from agent.site.site import Site
from learner.evaluation import floor
from learner.evaluation.verdict import Scores


def score(site: Site, ledger: Ledger, plates: list[str]) -> Scores:
    """Return the floor's probabilities float [N, F] on N plates of the store; nan where train labels lack a class."""
    train = [
        image
        for image in planning.training_images(site, ledger)
        if image["range"] == "train" and any(value is not None for value in image["labels"])
    ]
    labels = np.array([[np.nan if v is None else v for v in image["labels"]] for image in train], float)
    return floor.scores(
        _thumbnails(site, [image["plate"] for image in train]),
        labels.reshape(len(train), len(site.findings)),
        _thumbnails(site, plates),
        site.findings,
    )


def _thumbnails(site: Site, plates: list[str]) -> np.ndarray:
    return floor.thumbnails(
        len(plates), lambda low, high: np.stack([site.store.plate(plate) for plate in plates[low:high]])
    )
