"""From a result of the outbox to the DICOM object for the PACS: header of the original, scores, thresholds, heatmap.

Must not send anything and must not write to the ledger.
"""

import hashlib

import numpy as np
from pydicom import Dataset

from agent.images.records import original_path, read_plate
from agent.results.heatmap import overlay
from agent.results.outbox import OutgoingResult
from agent.site import files
from agent.site.config import zone
from agent.site.site import Site
from cxrloop import __version__, npy
from deploy.bundle.bundle import Bundle
from dicom.errors import HeaderIncomplete
from dicom.outgoing.results import Score, Scored, read_image
from dicom.outgoing.secondary_capture import capture
from dicom.outgoing.structured_report import report

__all__ = ["HeaderIncomplete", "make_object"]

PANELS = 4  # heatmaps of one object


def make_object(site: Site, result: OutgoingResult, bundles: dict[str, Bundle]) -> Dataset:
    """Return the report ("sr") or the heatmap ("sc") of a result.

    `bundles` keeps opened bundles by id. Raises Problem, BundleRefused, HeaderIncomplete, OSError, and HOSTILE for
    an odd header.
    """
    bundle = bundles.get(result.bundle) or files.open_sealed(site, result.bundle)
    bundles[bundle.id] = bundle
    scores = tuple(
        Score(finding, probability, float(bundle.thresholds[finding]["threshold"]))
        for finding, probability in result.probabilities.items()
    )
    scored = Scored(
        sha256=result.image.sha256,
        bundle=bundle.id,
        scores=scores,
        at=result.scored_at.astimezone(zone(site.config)),
        device=hashlib.sha256(site.key("signing.pub")).hexdigest(),
        version=__version__,
    )
    header = read_image(original_path(site, result.image))
    if result.kind == "sr":
        return report(header, scored)
    assert result.heatmap is not None  # queued with every "sc"
    heatmap = npy.loads(result.heatmap).astype(np.float32)
    plate = read_plate(site, result.image)
    panels = [(score, np.asarray(overlay(plate, heatmap[place]))) for place, score in findings_to_show(scores)]
    return capture(header, scored, panels)


def findings_to_show(scores: tuple[Score, ...]) -> list[tuple[int, Score]]:
    """Return (place, score) of at most PANELS findings at or above their threshold, else of the nearest finding."""
    ranked = sorted(enumerate(scores), key=lambda pair: pair[1].probability - pair[1].threshold, reverse=True)
    return [pair for pair in ranked if pair[1].above][:PANELS] or ranked[:1]
