"""The audit: who did what and why, with the state before and after; a hash chain that shows any edit.

`append` runs inside the transaction of the act. After the commit, `anchor` signs the newest hash into a file outside the
database: the chain alone does not show that its end was cut off, or that all of it was rewritten.
Entries hold pseudonyms, never names of patients.
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from agent.ledger.database import Ledger, canonical, utc

GENESIS = "0" * 64
FIELDS = ("seq", "at", "who", "what", "why", "before", "after", "previous")


def append(ledger: Ledger, who: str, what: str, why: str, before: Any = None, after: Any = None) -> None:
    """Add one entry inside the caller's transaction. `before` and `after` are stored as JSON."""
    last = ledger.row("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1")
    entry = {
        "seq": (last["seq"] if last else 0) + 1,
        "at": utc(),
        "who": who,
        "what": what,
        "why": why,
        "before": canonical(before),
        "after": canonical(after),
        "previous": last["hash"] if last else GENESIS,
    }
    ledger.insert("audit", **entry, hash=digest(entry))


def digest(entry: dict[str, Any]) -> str:
    """Return the SHA-256 of an entry's fields, including the previous hash, as canonical JSON."""
    return hashlib.sha256(canonical({key: entry[key] for key in FIELDS}).encode()).hexdigest()


def anchor(ledger: Ledger, heads: Path, signing_key: bytes) -> None:
    """Sign the newest entry's hash into the file `heads`, once. Runs after each act and at every start."""
    last = ledger.row("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1")
    if not last:
        return
    with heads.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        lines = whole_lines(file.read())
        if lines and lines[-1].startswith(f"{last['seq']} "):
            return
        file.truncate(sum(len(line) + 1 for line in lines))
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # most commands sign nothing

        message = f"{last['seq']} {last['hash']}"
        signature = Ed25519PrivateKey.from_private_bytes(signing_key).sign(message.encode()).hex()
        file.write(f"{message} {signature}\n")
        file.flush()
        os.fsync(file.fileno())


def whole_lines(heads: str) -> list[str]:
    """Return the complete lines of the file of heads; `anchor` signs a line again that a power cut broke off."""
    return heads[: heads.rfind("\n") + 1].splitlines()


def verify(ledger: Ledger, heads: Path, public_key: bytes, head: str | None = None) -> dict[str, Any]:
    """Return `{"entries", "ok", "head", "broken"}`; `broken` names the first broken link, or is None.

    Detects an edited, deleted, inserted or moved entry and, by the signed heads, a chain that was cut or rewritten as a
    whole. `head` is a hash noted elsewhere that the chain must contain.
    """
    previous, hashes = GENESIS, {}
    broken: str | None = None
    for place, entry in enumerate(ledger.each("SELECT * FROM audit ORDER BY seq"), start=1):
        if entry["seq"] != place:
            broken = broken or f"entry {place} is missing (found {entry['seq']})"
        elif entry["previous"] != previous:
            broken = broken or f"entry {place} does not follow entry {place - 1}"
        elif entry["hash"] != digest(entry):
            broken = broken or f"entry {place} was changed"
        previous = entry["hash"]
        hashes[entry["seq"]] = previous
    broken = broken or _check_heads(heads, hashes, public_key)
    if head and not broken and head not in hashes.values():
        broken = f"the head {head[:12]}... is not in the chain"
    return {"entries": len(hashes), "ok": broken is None, "head": previous, "broken": broken}


def _check_heads(heads: Path, hashes: dict[int, str], public_key: bytes) -> str | None:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    lines = whole_lines(heads.read_text()) if heads.exists() else []
    if hashes and not lines:
        return f"{heads.name} is missing, so the chain cannot be verified; restore it from the backup"
    key = Ed25519PublicKey.from_public_bytes(public_key)
    for number, line in enumerate(lines, start=1):
        try:
            seq, value, signature = line.split(" ")
            key.verify(bytes.fromhex(signature), f"{seq} {value}".encode())
        except (ValueError, InvalidSignature):
            return f"{heads.name}:{number}: not signed by this appliance"
        if int(seq) not in hashes:
            return f"entry {seq} was signed on {heads.name}:{number} but is gone"
        if hashes[int(seq)] != value:
            return f"entry {seq} differs from what was signed on {heads.name}:{number}"
    return None


def tail(ledger: Ledger, limit: int) -> list[dict[str, Any]]:
    """Return the newest `limit` entries, oldest first."""
    rows = ledger.rows("SELECT * FROM audit ORDER BY seq DESC LIMIT ?", limit)
    return [{**row, "before": json.loads(row["before"]), "after": json.loads(row["after"])} for row in reversed(rows)]
