"""Bundles: immutable, content-addressed, signed model folders under models/<id>/.

`seal` makes a bundle of a round's parts; `open_bundle` returns a bundle only if nothing changed since it was sealed.
Must not import the ledger: approval is decided elsewhere.
"""

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cxrloop.durable import sync_folder, write_synced
from deploy.bundle.contract import PARTS, check_parts
from deploy.bundle.signing import canonical, sign, signed_by
from deploy.errors import BundleRefused

SEAL = "seal.json"
PURPOSE = "cxrloop bundle v1"
ID = re.compile(r"[0-9a-f]{12}")
CHUNK = 1 << 20  # bytes copied at a time


@dataclass(frozen=True)
class Bundle:
    """An opened and verified bundle; `files` maps each file's name to its sha256."""

    id: str
    folder: Path
    findings: tuple[str, ...]
    card: dict
    thresholds: dict
    plate_version: int
    files: dict[str, str]


def seal(parts: Path, models: Path, signing_key: bytes) -> str:
    """Copy the four parts into models/<id>/, hash and sign them. Return the id.

    Durable when it returns; sealing the same parts again returns the same id. Raises BundleRefused.
    """
    try:
        check_parts(parts)
    except BundleRefused as wrong:
        raise BundleRefused(f"{parts} can't be sealed: {wrong}") from None
    models.mkdir(parents=True, exist_ok=True)
    temp = models / f".{uuid.uuid4().hex}.tmp"
    temp.mkdir()
    try:
        files = {name: _copy_hashed(parts / name, temp / name) for name in PARTS}
        bundle = bundle_id(files)
        body = {"bundle": bundle, "files": files}
        sealed = {**body, "signature": sign(PURPOSE, body, signing_key)}
        write_synced(temp / SEAL, json.dumps(sealed, indent=1, sort_keys=True).encode(), 0o444)
        sync_folder(temp)
        if not (models / bundle).exists():
            temp.rename(models / bundle)
            sync_folder(models)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    _verify(models / bundle, bundle, sealed)  # an older folder with this id must hold the same bytes
    return bundle


def open_bundle(models: Path, bundle: str, public_key: bytes) -> Bundle:
    """Return a bundle after checking its signature, the hash of every file and its plate version; BundleRefused."""
    if not ID.fullmatch(bundle):
        raise BundleRefused(f"bundle {bundle!r}: not an id; expected 12 hex digits, see `cxrloop models ls`")
    folder = models / bundle
    if not folder.is_dir():
        raise BundleRefused(f"bundle {bundle}: no folder {folder}; see `cxrloop models ls` or the backup")
    try:
        sealed = json.loads((folder / SEAL).read_bytes())
        body = {"bundle": sealed["bundle"], "files": sealed["files"]}
        signature = str(sealed["signature"])
    except FileNotFoundError:
        raise BundleRefused(f"bundle {bundle}: unsigned (no {SEAL}); seal it with `cxrloop models import`") from None
    except (ValueError, KeyError, TypeError):
        raise BundleRefused(f"bundle {bundle}: {SEAL} is unreadable; restore {folder} from the backup") from None
    if not signed_by(PURPOSE, body, signature, public_key):
        raise BundleRefused(
            f"bundle {bundle}: {SEAL} is not signed by this site's key; restore {folder} from the backup"
        )
    _verify(folder, bundle, body)
    try:
        card, thresholds = check_parts(folder)
    except BundleRefused as wrong:
        raise BundleRefused(f"bundle {bundle}: {wrong}") from None
    return Bundle(
        id=bundle,
        folder=folder,
        findings=tuple(card["findings"]),
        card=card,
        thresholds=thresholds,
        plate_version=card["plate_version"],
        files=dict(sealed["files"]),
    )


def bundle_id(files: dict[str, str]) -> str:
    """Return the first 12 hex digits of the sha256 over the sorted (name, sha256) list."""
    return hashlib.sha256(canonical({"files": sorted(files.items())})).hexdigest()[:12]


def _verify(folder: Path, bundle: str, sealed: dict) -> None:
    """Raise BundleRefused unless the folder holds exactly the sealed files, unchanged, and its id matches them."""
    restore = f"restore {folder} from the backup"
    files = sealed["files"]
    if sealed["bundle"] != bundle or set(files) != set(PARTS) or bundle_id(files) != bundle:
        raise BundleRefused(f"bundle {bundle}: {SEAL} belongs to another bundle ({sealed['bundle']}); {restore}")
    for name in sorted({path.name for path in folder.iterdir()} ^ {*PARTS, SEAL}):
        what = "is missing" if name in PARTS else "was added after sealing"
        raise BundleRefused(f"bundle {bundle}: {name} {what}; {restore}")
    for name, expected in files.items():
        if sha256_of(folder / name) != expected:
            raise BundleRefused(f"bundle {bundle}: {name} was changed after sealing; {restore}")


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy_hashed(source: Path, target: Path) -> str:
    digest = hashlib.sha256()

    def chunks() -> Iterator[bytes]:
        with source.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                yield chunk

    write_synced(target, chunks(), 0o444)  # read-only, against accidental changes
    return digest.hexdigest()


def sweep(models: Path) -> None:
    """Remove the folders that a crash during `seal` left. Call it while nothing is being sealed."""
    for leftover in models.glob(".*.tmp"):
        shutil.rmtree(leftover)
