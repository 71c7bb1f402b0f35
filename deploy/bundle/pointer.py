"""The signed pointer `current`: which bundle is in service, and which one was before it.

Refuses to know whether the bundle loads (deploy.server.session) or may serve (the gate and a person decide that).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cxrloop.durable import sign, signed_by, write_atomic
from deploy.bundle.bundle import ID
from deploy.bundle.keys import read_public

POINTER = "current"
PURPOSE = "cxrloop pointer v1"


class PointerRefused(Exception):
    """A pointer that is changed, unsigned or unreadable; says so and what to do."""


@dataclass(frozen=True)
class Pointer:
    """What `current` says; `at` is ISO 8601 UTC, `by` the person or "cxrloop"."""

    bundle: str
    previous: str | None
    by: str
    at: str


def read(site: Path) -> Pointer | None:
    """The verified pointer of a site folder, None where there is none yet; PointerRefused when tampered with."""
    path = site / POINTER
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    hint = "set it again with `cxrloop rollback --to BUNDLE`, and look at `cxrloop audit verify`"
    try:
        document = json.loads(raw)
        signature = document.pop("signature")
        pointer = Pointer(**document)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PointerRefused(f"{path}: unreadable; {hint}") from None
    if not isinstance(signature, str) or not signed_by(PURPOSE, document, signature, read_public(site / "keys")):
        raise PointerRefused(f"{path}: changed by hand or signed by another key; {hint}")
    return pointer


def write(site: Path, bundle: str, previous: str | None, by: str, at: str, signing_key: bytes) -> Pointer:
    """Sign and atomically replace the pointer; durable when this returns. ValueError for an id that is none."""
    for name in (bundle, previous):
        if name is not None and not ID.fullmatch(name):
            raise ValueError(f"bundle {name!r}: not an id; expected 12 hex digits")
    pointer = Pointer(bundle, previous, by, at)
    document = asdict(pointer)
    signed = {**document, "signature": sign(PURPOSE, document, signing_key)}
    write_atomic(site / POINTER, json.dumps(signed, indent=1).encode())
    return pointer


def mark(site: Path) -> tuple[int, int, int] | None:
    """A cheap (mtime, inode, size) that changes whenever the pointer is written; None where there is none."""
    try:
        seen = (site / POINTER).stat()
    except FileNotFoundError:
        return None
    return seen.st_mtime_ns, seen.st_ino, seen.st_size
