"""Files that exist or do not: temp + fsync + rename + folder fsync, and a signature over a small JSON document.

Refuses to know what is written.
"""

import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, chunks: bytes | Iterable[bytes], mode: int = 0o644) -> None:
    """Write a new file and fsync it; FileExistsError if it is there. Not atomic by itself."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as out:
        for chunk in [chunks] if isinstance(chunks, bytes) else chunks:
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())


def replace_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Put `data` at `path`, whole or not at all; durable when this returns."""
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write_synced(temp, data, mode)
        temp.replace(path)
    except OSError:
        temp.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def canonical(document: dict) -> bytes:
    """The one byte form of a JSON document that is hashed and signed."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def sign(purpose: str, document: dict, signing_key: bytes) -> str:
    """Hex ed25519 signature; `purpose` keeps a pointer's signature from passing as a bundle's."""
    private = Ed25519PrivateKey.from_private_bytes(signing_key)
    return private.sign(purpose.encode() + b"\n" + canonical(document)).hex()


def signed_by(purpose: str, document: dict, signature: str, public_key: bytes) -> bool:
    """Whether `signature` is the key owner's over this document for this purpose."""
    try:
        raw = bytes.fromhex(signature)
        Ed25519PublicKey.from_public_bytes(public_key).verify(raw, purpose.encode() + b"\n" + canonical(document))
    except (InvalidSignature, ValueError):
        return False
    return True
