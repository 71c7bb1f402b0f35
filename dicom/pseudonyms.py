"""Pseudonyms: keyed hashes that replace a patient's identity, at the site and in exports, and values derived from them.

Without the site's key nobody can reverse or repeat them. Must not import a header or a file reader.
"""

import hashlib
import hmac
import uuid

# What consoles write for an unknown patient; otherwise all such images would become one patient
PLACEHOLDERS = frozenset(("", "0", "NA", "N/A", "NONE", "NULL", "UNKNOWN", "ANON", "ANONYMOUS", "ANONYMIZED"))

MAX_DAYS = 3650  # ten years: hides the year of the image, but keeps its era


def patient_key(key: bytes, patient_id: str, issuer: str, study_uid: str) -> tuple[str, bool]:
    """Return ("p" + 16 hex, True) for the patient; ("s" + 16 hex, False) for the study if no patient is named."""
    patient_id = patient_id.strip()
    if patient_id.upper() in PLACEHOLDERS:
        return "s" + _hmac(key, b"study", study_uid).hex()[:16], False
    return "p" + _hmac(key, b"patient", issuer.strip(), patient_id).hex()[:16], True


def fraction(key: bytes, patient_key: str) -> float:
    """Return a number in [0, 1), fixed for a patient, that assigns the patient to a range."""
    return (int.from_bytes(_hmac(key, b"range", patient_key)[:8]) >> 11) / (1 << 53)


def refusal(key: bytes, patient_key: str) -> str:
    """Return "r" + 32 hex: the mark of a patient whose images are refused. It replaces the erased pseudonym."""
    return "r" + _hmac(key, b"refuse", patient_key).hex()[:32]


def study_mark(key: bytes, study_uid: str) -> str:
    """Return "u" + 32 hex: the mark of a study of an archive. Lists of marks outlive the images and identify nobody."""
    return "u" + _hmac(key, b"study mark", study_uid).hex()[:32]


def export_key(key: bytes, patient_key: str) -> str:
    """Return "e" + 16 hex: the patient's pseudonym in exports; without the key it cannot be linked to the site's."""
    return "e" + _hmac(key, b"export", patient_key).hex()[:16]


def export_uid(key: bytes, kind: str, uid: str) -> str:
    """Return the exported UID for a study, series or image UID (PS3.5 B.2: 2.25 and a UUID); unique within a `kind`."""
    return f"2.25.{uuid.UUID(bytes=_hmac(key, b'export uid', kind, uid)[:16], version=5).int}"


def days_back(key: bytes, patient_key: str) -> int:
    """Return by how many days (1 to 3650) all exported dates of a patient move back; intervals stay the same."""
    return 1 + int.from_bytes(_hmac(key, b"export days", patient_key)[:8]) % MAX_DAYS


def _hmac(key: bytes, purpose: bytes, *parts: str) -> bytes:
    if len(key) < 16:
        raise ValueError(f"pseudonym key of {len(key)} bytes: needs at least 16")
    # with the lengths, different lists of parts never give the same message
    message = b"".join(len(part).to_bytes(4) + part for part in (purpose, *(text.encode() for text in parts)))
    return hmac.new(key, message, hashlib.sha256).digest()
