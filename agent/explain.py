"""What a model said of a film, and where it looked: the heatmap that the served graph itself draws."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agent import look, release
from agent.errors import Problem
from agent.ledger import Ledger, utc, when
from agent.site import Site
from deploy.session import Session

METHODS = ("heatmap",)
SIDE = 512


def explain(
    site: Site, ledger: Ledger, uid: str, finding: str | None, method: str, as_of: str | None, output: Path | None
) -> dict[str, Any]:
    """`{"bundle", "probability", "threshold", "method", "image"}`; `image` is the overlay's path, or None without `output`.

    `as_of` takes the bundle that was in service at that time. Raises Problem for an unknown film, finding or time.
    """
    if method not in METHODS:
        raise Problem(f"--method {method}: must be one of {', '.join(METHODS)}")
    film = ledger.row(
        "SELECT * FROM image WHERE (sop_uid = ? OR id = ?) AND plate IS NOT NULL ORDER BY id DESC LIMIT 1",
        uid, int(uid) if uid.isdigit() else -1,
    )  # fmt: skip
    if not film:
        raise Problem(f"explain {uid}: no stored film with this SOP Instance UID or image number")
    bundle = look.opened(site, _bundle(ledger, as_of))
    name = finding or bundle.findings[0]
    if name not in bundle.findings:
        raise Problem(f"--finding {name}: bundle {bundle.id} knows {', '.join(bundle.findings)}")
    plate = site.store.plate(film["plate"])
    answer = Session(bundle, site.config.infer.provider).predict(plate[None])
    place = bundle.findings.index(name)
    if output:
        overlay(plate, answer.heatmap[0, place]).save(output, "PNG")
    return {
        "bundle": bundle.id,
        "finding": name,
        "probability": round(float(answer.probabilities[0, place]), 6),
        "threshold": bundle.thresholds[name]["threshold"],
        "method": method,
        "image": str(output) if output else None,
    }


def _bundle(ledger: Ledger, as_of: str | None) -> str:
    if as_of is None:
        current = release.in_service(ledger)
        if not current:
            raise Problem("explain: no model is in service")
        return current["id"]
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
