"""An image as the ledger holds it, and its files in the store.

An image that travels between functions is an `ImageRecord`; a row that is used right after its query stays a row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from agent.errors import Problem
from agent.ledger.database import Row
from agent.ledger.states import FORGOTTEN
from agent.site.site import Site

if TYPE_CHECKING:
    import numpy as np  # most commands read no plate


@dataclass(frozen=True)
class ImageRecord:
    """One row of the table `image`, without the columns that only rounds and lists read."""

    id: int
    sha256: str  # of transfer syntax UID + data set bytes
    state: str
    reason: str | None  # why it was rejected or quarantined
    sop_uid: str | None
    study_uid: str | None
    patient_key: str | None  # pseudonym
    view: str | None  # "PA" | "AP"
    pixel_sha256: str | None  # of the decoded stored values
    original: str  # place in the store
    plate: str | None  # place in the store; None for a rejected or quarantined image
    file: str | None  # name under which it was imported
    superseded_by: int | None  # id of the image that corrects this one
    dropped_at: str | None  # when retention removed the original

    @classmethod
    def from_row(cls, row: Row) -> ImageRecord:
        """Return the record of a row that has all columns of the table `image`."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})


def original_path(site: Site, image: ImageRecord) -> Path:
    """Return the path of an image's original file; raises Problem when the file was removed on purpose."""
    if image.reason == FORGOTTEN:
        raise Problem(f"image {image.id}: removed by `cxrloop forget`; none of its files is left")
    if image.dropped_at:
        raise Problem(
            f"image {image.id}: its original was dropped on {image.dropped_at[:10]} ([retention]); reports, heatmaps "
            "and exports need the original: let the PACS send the image again"
        )
    return site.store.path(image.original)


def read_plate(site: Site, image: ImageRecord) -> np.ndarray:
    """Return the plate, uint8 [512, 512].

    Raises Problem for an image that has no plate; FileNotFoundError, ValueError or EOFError for a lost or damaged file.
    """
    if image.plate is None:
        raise Problem(f"image {image.id}: {image.state} ({image.reason}), so it has no plate")
    return site.store.plate(image.plate)
