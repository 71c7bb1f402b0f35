"""Pseudonyms: keyed hashes that stand for a patient, and the number that places a patient in a range.

Knows no header and no file; without the site's key nothing here can be undone or repeated.
"""

import hashlib
import hmac

# What consoles write when they know no patient; such films would all become one patient
PLACEHOLDERS = frozenset(("", "0", "NA", "N/A", "NONE", "NULL", "UNKNOWN", "ANON", "ANONYMOUS", "ANONYMIZED"))


def patient_key(key: bytes, patient_id: str, issuer: str, study_uid: str) -> tuple[str, bool]:
    """("p" + 16 hex, True) of the patient, or ("s" + 16 hex, False) of the study when the header names no patient."""
    patient_id = patient_id.strip()
    if patient_id.upper() in PLACEHOLDERS:
        return "s" + _hmac(key, b"study", study_uid).hex()[:16], False
    return "p" + _hmac(key, b"patient", issuer.strip(), patient_id).hex()[:16], True


def fraction(key: bytes, patient_key: str) -> float:
    """A number in [0, 1), fixed for a patient, that decides the patient's range."""
    return (int.from_bytes(_hmac(key, b"range", patient_key)[:8]) >> 11) / (1 << 53)


def _hmac(key: bytes, purpose: bytes, *parts: str) -> bytes:
    if len(key) < 16:
        raise ValueError(f"pseudonym key of {len(key)} bytes: needs at least 16")
    # lengths go in, so that no two lists of parts give one message
    message = b"".join(len(part).to_bytes(4) + part for part in (purpose, *(text.encode() for text in parts)))
    return hmac.new(key, message, hashlib.sha256).digest()
