"""What a model said of an image, and where it looked: the map that the served graph draws, or one of the learner's.

Draws the picture; how a map comes about is the graph's and the learner's business.
"""

from collections.abc import Sequence
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agent.errors import Problem
from agent.ledger.database import Ledger, image_number, utc, when
from agent.release import models
from agent.results import attribution
from agent.site import files
from agent.site.site import Site
from deploy.server.session import Session

METHODS = ("heatmap", *attribution.METHODS)
SIDE = 512


def explain(
    site: Site, ledger: Ledger, uid: str, finding: str | None, method: str, as_of: str | None, output: Path | None,
    positive: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """`{"bundle", "probability", "threshold", "method", "image"}`; `image` is the overlay's path, or None without `output`.

    `as_of` takes the bundle that was in service at that time; `positive` keeps what speaks for the finding. Integrals add
    `completeness`. Raises Problem for an unknown image, finding, method or time, and for a map that can't be had.
    """
    if method not in METHODS:
        raise Problem(f"--method {method}: must be one of {', '.join(METHODS)}")
    image = ledger.row(
        "SELECT * FROM image WHERE (sop_uid = ? OR id = ?) AND plate IS NOT NULL ORDER BY id DESC LIMIT 1",
        uid, image_number(uid),
    )  # fmt: skip
    if not image:
        raise Problem(f"explain {uid}: no stored image with this SOP Instance UID or image number")
    bundle = files.open_sealed(site, _bundle(ledger, as_of))
    name = finding or bundle.findings[0]
    if name not in bundle.findings:
        raise Problem(f"--finding {name}: bundle {bundle.id} knows {', '.join(bundle.findings)}")
    plate = site.store.plate(image["plate"])
    answer = Session(bundle, site.config.infer.provider).predict(plate[None])
    place = bundle.findings.index(name)
    probability, measured = float(answer.probabilities[0, place]), {}
    maps = answer.heatmap[:, place].clip(min=0) if positive else answer.heatmap[:, place]
    if method != "heatmap":
        path = site.store.path(image["plate"])
        maps, measured = attribution.maps(site, ledger, bundle, path, name, method, positive, probability)
    if output:
        panels([overlay(plate, one) for one in maps]).save(output, "PNG")
    return {
        "bundle": bundle.id,
        "finding": name,
        "probability": round(probability, 6),
        "threshold": bundle.thresholds[name]["threshold"],
        "method": method,
        "image": str(output) if output else None,
        **measured,
    }


def _bundle(ledger: Ledger, as_of: str | None) -> str:
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


def overlay(plate: np.ndarray, heat: np.ndarray) -> Image.Image:
    """The plate uint8 [512, 512] with heat float [g, g] over it: red where the map is high, clear where it is low."""
    low, high = float(heat.min()), float(heat.max())
    scaled = (heat - low) / (high - low) if high > low else np.zeros_like(heat)
    smooth = Image.fromarray((scaled * 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    alpha = np.asarray(smooth, np.float32)[..., None] / 255 * 0.6
    grey = np.repeat(plate[..., None].astype(np.float32), 3, axis=2)
    red = np.array([255.0, 48.0, 0.0], np.float32)
    return Image.fromarray((grey * (1 - alpha) + red * alpha).astype(np.uint8))


def panels(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size side by side, in rows of a near-square sheet (one head of an attention each)."""
    columns = ceil(sqrt(len(pictures)))
    sheet = Image.new("RGB", (SIDE * columns, SIDE * ceil(len(pictures) / columns)))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (SIDE * (number % columns), SIDE * (number // columns)))
    return sheet
