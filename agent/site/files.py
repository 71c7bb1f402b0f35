"""Files of a site that a ledger row names: the original of an image, a sealed bundle."""

from pathlib import Path

from agent.errors import Problem
from agent.ledger.database import Row
from agent.ledger.schema import FORGOTTEN
from agent.site.site import Site
from deploy.bundle.bundle import Bundle, open_bundle


def open_sealed(site: Site, bundle: str) -> Bundle:
    """Return a sealed bundle after its hashes and its signature were verified; raises BundleRefused."""
    return open_bundle(site.models, bundle, site.key("signing.pub"))


def original(site: Site, row: Row) -> Path:
    """The file of an image as it came in; raises Problem, saying when and why it went."""
    if row["reason"] == FORGOTTEN:
        raise Problem(f"image {row['id']}: forgotten at the patient's wish; nothing of it is left")
    if row["dropped_at"]:
        raise Problem(
            f"image {row['id']}: its original was dropped on {row['dropped_at'][:10]} ([retention]); what is made from "
            "the original (results, exports) needs it: let the PACS send the image again"
        )
    return site.store.path(row["original"])
