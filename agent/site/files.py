"""Files of a site that a ledger row names: the original of an image, a sealed bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from agent.errors import Problem
from agent.ledger.database import Row
from agent.site.site import Site

if TYPE_CHECKING:
    from deploy.bundle.bundle import Bundle


def open_sealed(site: Site, bundle: str) -> Bundle:
    """Return a sealed bundle after its hashes and its signature were verified; raises BundleRefused."""
    from deploy.bundle.bundle import open_bundle

    return open_bundle(site.models, bundle, site.key("signing.pub"))


def original(site: Site, row: Row) -> Path:
    """The file of an image as it came in; raises Problem, saying when and why it went."""
    from agent.ledger.schema import FORGOTTEN

    if row["reason"] == FORGOTTEN:
        raise Problem(f"image {row['id']}: forgotten at the patient's wish; nothing of it is left")
    if row["dropped_at"]:
        raise Problem(
            f"image {row['id']}: its original was dropped on {row['dropped_at'][:10]} ([retention]); what is made from "
            "the original (results, exports) needs it: let the PACS send the image again"
        )
    return site.store.path(row["original"])
