"""ed25519 signatures over small JSON documents: the seal of a bundle, the pointer."""

import json

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


def canonical(document: dict) -> bytes:
    """Return the one byte form of a JSON document that is hashed and signed: sorted keys, no blanks, ASCII."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def sign(purpose: str, document: dict, signing_key: bytes) -> str:
    """Return the signature in hex. `purpose` separates pointers from bundles: neither passes as the other."""
    private = Ed25519PrivateKey.from_private_bytes(signing_key)
    return private.sign(_message(purpose, document)).hex()


def signed_by(purpose: str, document: dict, signature: str, public_key: bytes) -> bool:
    """Return whether the owner of `public_key` signed this document for this purpose."""
    try:
        raw = bytes.fromhex(signature)
        Ed25519PublicKey.from_public_bytes(public_key).verify(raw, _message(purpose, document))
    except (InvalidSignature, ValueError):
        return False
    return True


def _message(purpose: str, document: dict) -> bytes:
    return purpose.encode() + b"\n" + canonical(document)
