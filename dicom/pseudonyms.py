"""Pseudonyms: keyed hashes that stand for a patient, at the site and outside it, and what else hangs on them.

Knows no header and no file; without the site's key nothing here can be undone or repeated.
"""

import hashlib
import hmac
import uuid

# What consoles write when they know no patient; such images would all become one patient
PLACEHOLDERS = frozenset(("", "0", "NA", "N/A", "NONE", "NULL", "UNKNOWN", "ANON", "ANONYMOUS", "ANONYMIZED"))

MAX_DAYS = 3650  # ten years: enough to hide the year, too little to make an image look like another era's


def patient_key(key: bytes, patient_id: str, issuer: str, study_uid: str) -> tuple[str, bool]:
    """("p" + 16 hex, True) of the patient, or ("s" + 16 hex, False) of the study when the header names no patient."""
    patient_id = patient_id.strip()
    if patient_id.upper() in PLACEHOLDERS:
        return "s" + _hmac(key, b"study", study_uid).hex()[:16], False
    return "p" + _hmac(key, b"patient", issuer.strip(), patient_id).hex()[:16], True


def fraction(key: bytes, patient_key: str) -> float:
    """A number in [0, 1), fixed for a patient, that decides the patient's range."""
    return (int.from_bytes(_hmac(key, b"range", patient_key)[:8]) >> 11) / (1 << 53)


def refusal(key: bytes, patient_key: str) -> str:
    """ "r" + 32 hex that stands for a patient whose images are refused; not the pseudonym, which is forgotten."""
    return "r" + _hmac(key, b"refuse", patient_key).hex()[:32]


def study_mark(key: bytes, study_uid: str) -> str:
    """ "u" + 32 hex that stands for a study of an archive: such a list outlives the images, and must lead to nobody."""
    return "u" + _hmac(key, b"study mark", study_uid).hex()[:32]


def outside_key(key: bytes, patient_key: str) -> str:
    """ "e" + 16 hex: the same patient in images that leave the site; no list of the site's pseudonyms leads to it."""
    return "e" + _hmac(key, b"export", patient_key).hex()[:16]


def outside_uid(key: bytes, kind: str, uid: str) -> str:
    """The UID of a study, series or image outside the site (PS3.5 B.2: 2.25 and a UUID), one for one within a `kind`."""
    return f"2.25.{uuid.UUID(bytes=_hmac(key, b'export uid', kind, uid)[:16], version=5).int}"


def days_back(key: bytes, patient_key: str) -> int:
    """1 to 3650: by how many days every date of a patient moves back outside the site, so that intervals stay."""
    return 1 + int.from_bytes(_hmac(key, b"export days", patient_key)[:8]) % MAX_DAYS


def _hmac(key: bytes, purpose: bytes, *parts: str) -> bytes:
    if len(key) < 16:
        raise ValueError(f"pseudonym key of {len(key)} bytes: needs at least 16")
    # lengths go in, so that no two lists of parts give one message
    message = b"".join(len(part).to_bytes(4) + part for part in (purpose, *(text.encode() for text in parts)))
    return hmac.new(key, message, hashlib.sha256).digest()
