"""From a row of the outbox to the object that the PACS gets: original's header, score, thresholds and heatmap together.

Refuses to know when and where it is sent.
"""

import hashlib
import json

import numpy as np
from pydicom import Dataset

from agent.ledger.database import Row, when
from agent.results import explain
from agent.site import files
from agent.site.config import zone
from agent.site.site import Site
from cxrloop import __version__, npy
from deploy.bundle.bundle import Bundle
from dicom.errors import HeaderIncomplete
from dicom.outgoing.results import Score, Scored, read_image
from dicom.outgoing.secondary_capture import capture
from dicom.outgoing.structured_report import report

__all__ = ["HeaderIncomplete", "make"]

PANELS = 4  # heatmaps of one sheet


def make(site: Site, row: Row, bundles: dict[str, Bundle]) -> Dataset:
    """The report ("sr") or the heatmap ("sc") of an outbox row that was joined with its image and score.

    `bundles` keeps what was opened. Raises Problem, BundleRefused, HeaderIncomplete, OSError; odd headers raise what they will.
    """
    bundle = bundles.get(row["bundle"]) or files.open_sealed(site, row["bundle"])
    bundles[bundle.id] = bundle
    scores = tuple(
        Score(name, probability, float(bundle.thresholds[name]["threshold"]))
        for name, probability in json.loads(row["probabilities"]).items()
    )
    said = Scored(
        sha256=row["sha256"],
        bundle=bundle.id,
        scores=scores,
        at=when(row["scored_at"]).astimezone(zone(site.config)),
        device=hashlib.sha256(site.key("signing.pub")).hexdigest(),
        version=__version__,
    )
    image = read_image(files.original(site, row))
    if row["kind"] == "sr":
        return report(image, said)
    heat = npy.loads(row["heatmap"]).astype(np.float32)
    plate = site.store.plate(row["plate"])
    panels = [(score, np.asarray(explain.overlay(plate, heat[place]))) for place, score in chosen(scores)]
    return capture(image, said, panels)


def chosen(scores: tuple[Score, ...]) -> list[tuple[int, Score]]:
    """(place, score) of at most PANELS findings at or above their threshold, else of the one that comes nearest."""
    ranked = sorted(enumerate(scores), key=lambda pair: pair[1].probability - pair[1].threshold, reverse=True)
    return [pair for pair in ranked if pair[1].above][:PANELS] or ranked[:1]
