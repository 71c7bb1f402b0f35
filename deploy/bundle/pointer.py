"""The signed pointer `current`: the bundle in service and the one before it.

The gate and a person decide which bundle may serve; deploy.server.session checks that it loads.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cxrloop.durable import write_atomic
from deploy.bundle.keys import read_public
from deploy.bundle.signing import sign, signed_by
from deploy.errors import PointerRefused

POINTER = "current"
PURPOSE = "cxrloop pointer v1"


@dataclass(frozen=True)
class Pointer:
    """The content of `current`; `at` is ISO 8601 UTC, `by` the person or "cxrloop"."""

    bundle: str
    previous: str | None
    by: str
    at: str


def read(site: Path) -> Pointer | None:
    """Return the verified pointer of a site folder, or None if there is none; PointerRefused if it was changed."""
    path = site / POINTER
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    hint = "set it again with `cxrloop rollback --to BUNDLE`, and check `cxrloop audit verify`"
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
    """Sign the pointer and replace the file atomically; durable when this returns. ValueError for a malformed id."""
    from deploy.bundle.bundle import ID

    for name in (bundle, previous):
        if name is not None and not ID.fullmatch(name):
            raise ValueError(f"bundle {name!r}: not an id; expected 12 hex digits")
    pointer = Pointer(bundle, previous, by, at)
    document = asdict(pointer)
    signed = {**document, "signature": sign(PURPOSE, document, signing_key)}
    write_atomic(site / POINTER, json.dumps(signed, indent=1).encode())
    return pointer


def mark(site: Path) -> tuple[int, int, int] | None:
    """Return (mtime in ns, inode, size) of the pointer file, which every write changes; None if there is none."""
    try:
        state = (site / POINTER).stat()
    except FileNotFoundError:
        return None
    return state.st_mtime_ns, state.st_ino, state.st_size
