"""The site's ed25519 signing keys: `init` writes them; sealing and verifying read them."""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cxrloop.durable import sync_folder, write_synced
from deploy.errors import KeyRefused

PRIVATE, PUBLIC = "signing.key", "signing.pub"
KEY_BYTES = 32  # raw ed25519, private and public alike


def new_keys(folder: Path) -> None:
    """Write signing.key (mode 0600) and signing.pub, 32 raw bytes each; KeyRefused where one exists."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (PRIVATE, PUBLIC):
        if (folder / name).exists():
            raise KeyRefused(f"{folder / name} exists; a new key would make every bundle invalid. Move it away first")
    private = Ed25519PrivateKey.generate()
    write_synced(folder / PRIVATE, private.private_bytes_raw(), 0o600)
    write_synced(folder / PUBLIC, private.public_key().public_bytes_raw())
    sync_folder(folder)


def read_private(folder: Path) -> bytes:
    """Return the 32 raw bytes of signing.key; KeyRefused."""
    return _read(folder / PRIVATE)


def read_public(folder: Path) -> bytes:
    """Return the 32 raw bytes of signing.pub; KeyRefused."""
    return _read(folder / PUBLIC)


def _read(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise KeyRefused(f"{path}: missing; restore the keys folder from the backup, or run `cxrloop init`") from None
    except PermissionError:
        raise KeyRefused(f"{path}: not readable by this user; run as the site's user") from None
    if len(raw) != KEY_BYTES:
        raise KeyRefused(f"{path}: {len(raw)} bytes, expected {KEY_BYTES}; restore the keys folder from the backup")
    return raw
