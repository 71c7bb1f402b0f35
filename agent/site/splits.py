"""The split of patients into ranges: golden, golden_next, calibration, validation, train.

A keyed hash of the patient decides the range, for labelled and unlabelled images alike; it never changes.
"""

from agent.errors import Problem
from agent.ledger.database import Ledger, canonical
from agent.site.config import PatientKeys
from dicom.pseudonyms import fraction

RESERVED = ("golden", "golden_next", "calibration", "validation")


def range_of(key: bytes, patient_key: str, identified: bool, shares: PatientKeys) -> str:
    """Return the range of a patient. An image without a patient id is never golden: its patient may train, too."""
    place, upper = fraction(key, patient_key), 0.0
    for name in RESERVED:
        upper += getattr(shares, name)
        if place < upper:
            return name if identified or not name.startswith("golden") else "train"
    return "train"


def fix_shares(ledger: Ledger, shares: PatientKeys) -> None:
    """Store the shares at the first image; raises Problem when the settings differ later."""
    now = canonical(shares.model_dump())
    known = ledger.value("SELECT value FROM site WHERE key = 'shares'")
    if known is None:
        with ledger.transaction():
            ledger.run("INSERT OR IGNORE INTO site VALUES ('shares', ?)", now)
    elif known != now:
        raise Problem(f"[patients] was {known} at the first image and can't change later: restore those values")
