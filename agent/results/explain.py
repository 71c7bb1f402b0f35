"""`cxrloop explain`: the score of one image, and the map of where the model found evidence for it.

The map is the heatmap of the served graph, or a saliency map that the learner computes (`agent.results.attribution`).
"""

from pathlib import Path
from typing import Any

from agent.errors import Problem
from agent.ledger.database import Ledger, image_number, utc, when
from agent.release import models
from agent.results import attribution
from agent.results.heatmap import overlay, sheet
from agent.site import files
from agent.site.site import Site
from deploy.server.session import Session

METHODS = ("heatmap", *attribution.METHODS)


def explain(
    site: Site, ledger: Ledger, uid: str, finding: str | None, method: str, as_of: str | None, output: Path | None,
    positive: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Return `{"bundle", "finding", "probability", "threshold", "method", "image"}`; write the picture to `output`.

    `image` is the path of the picture, None without `output`. `as_of` takes the bundle that was in service at that
    time; `positive` keeps only evidence for the finding. Integrated gradients add `completeness`. Raises Problem for
    an unknown image, finding, method or time, and when the map can't be computed.
    """
    if method not in METHODS:
        raise Problem(f"--method {method}: must be one of {', '.join(METHODS)}")
    image = ledger.row(
        "SELECT * FROM image WHERE (sop_uid = ? OR id = ?) AND plate IS NOT NULL ORDER BY id DESC LIMIT 1",
        uid, image_number(uid),
    )  # fmt: skip
    if not image:
        raise Problem(f"explain {uid}: no stored image with this SOP Instance UID or image number")
    bundle = files.open_sealed(site, _bundle_in_service(ledger, as_of))
    name = finding or bundle.findings[0]
    if name not in bundle.findings:
        raise Problem(f"--finding {name}: bundle {bundle.id} scores {', '.join(bundle.findings)}")
    plate = site.store.plate(image["plate"])
    answer = Session(bundle, site.config.infer.provider).predict(plate[None])
    place = bundle.findings.index(name)
    probability, measured = float(answer.probabilities[0, place]), {}
    maps = answer.heatmap[:, place].clip(min=0) if positive else answer.heatmap[:, place]
    if method != "heatmap":
        path = site.store.path(image["plate"])
        maps, measured = attribution.maps(site, ledger, bundle, path, name, method, positive, probability)
    if output:
        sheet([overlay(plate, saliency) for saliency in maps]).save(output, "PNG")
    return {
        "bundle": bundle.id,
        "finding": name,
        "probability": round(probability, 6),
        "threshold": bundle.thresholds[name]["threshold"],
        "method": method,
        "image": str(output) if output else None,
        **measured,
    }


def _bundle_in_service(ledger: Ledger, as_of: str | None) -> str:
    """Return the id of the bundle in service, now or at the time `as_of` (ISO 8601); raises Problem."""
    if as_of is None:
        current = models.in_service(ledger)
        if not current:
            raise Problem("explain: no model is in service")
        return current.id
    try:
        at = utc(when(as_of) if when(as_of).tzinfo else when(as_of + "+00:00"))
    except ValueError:
        raise Problem(f"--as-of {as_of}: not an ISO 8601 time") from None
    row = ledger.row(
        "SELECT bundle FROM deployment WHERE state IN ('probation', 'live') AND at <= ? ORDER BY id DESC LIMIT 1", at
    )
    if not row:
        raise Problem(f"--as-of {as_of}: no model was in service then")
    return row["bundle"]
