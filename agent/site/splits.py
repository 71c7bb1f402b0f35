"""Patients and their fixed ranges: golden, golden_next, calibration, validation, train.

One keyed hash of the patient decides, for labelled and unlabelled images alike, from the first image on.
"""

from agent.errors import Problem
from agent.ledger.database import Ledger, canonical
from agent.site.config import PatientKeys
from dicom.pseudonyms import fraction

RESERVED = ("golden", "golden_next", "calibration", "validation")


def range_of(key: bytes, patient_key: str, identified: bool, shares: PatientKeys) -> str:
    """The range of a patient. Without a patient id an image is never golden: the patient may be in train too."""
    place, upper = fraction(key, patient_key), 0.0
    for name in RESERVED:
        upper += getattr(shares, name)
        if place < upper:
            return name if identified or not name.startswith("golden") else "train"
    return "train"


def fix_shares(ledger: Ledger, shares: PatientKeys) -> None:
    """Remember the shares at the first image; raises Problem when the settings differ later."""
    now = canonical(shares.model_dump())
    known = ledger.value("SELECT value FROM site WHERE key = 'shares'")
    if known is None:
        with ledger.transaction():
            ledger.run("INSERT OR IGNORE INTO site VALUES ('shares', ?)", now)
    elif known != now:
        raise Problem(f"[patients] was {known} when the first image came and cannot change: put those values back")
