"""A peer as settings name it, "AET@host:port", or "AET@host:port/tls" where it speaks TLS.

Plain text to plain values; opens no connection and reads no certificate.
"""

import re
from dataclasses import dataclass

SPELLING = re.compile(r"([ -\[\]-~]{1,16})@([^@\s/]+):(\d{1,5})(/tls)?")


@dataclass(frozen=True)
class PeerAddress:
    """Another DICOM node: its AE title, where it is, and whether the way there is TLS."""

    aet: str
    host: str
    port: int
    tls: bool


def parse(text: str) -> PeerAddress:
    """The peer that `text` names; raises ValueError."""
    found = SPELLING.fullmatch(text)
    if not found or not 1 <= int(found[3]) <= 65535:
        raise ValueError(f'"AET@host:port" or "AET@host:port/tls", the AE title of 1 to 16 characters; {text!r} is not')
    return PeerAddress(found[1].strip(), found[2], int(found[3]), bool(found[4]))
