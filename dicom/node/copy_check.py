"""Checks for storage commitment: whether a file still is the received image, byte for byte.

Reads headers and hashes, and changes nothing. Must not import a ledger.
"""

from pathlib import Path

from dicom.dataset import header
from dicom.dataset.part10 import content_sha256, open_envelope, read_header
from dicom.errors import LookupFailed, Unreadable
from dicom.node.commitment import CLASS_CONFLICT, NO_SUCH_INSTANCE, PROCESSING_FAILURE, SUCCESS, Reference
from dicom.store.inbox import Inbox

MAX_FILES = 20_000  # files of the inbox that are read for one request: some seconds


def inbox_copies(inbox: Inbox, wanted: set[str]) -> dict[str, list[Path]]:
    """Return the inbox files of the wanted SOP instance UIDs (by their file meta). Raises LookupFailed."""
    files = inbox.waiting(MAX_FILES + 1)
    if len(files) > MAX_FILES:
        raise LookupFailed(f"more than {MAX_FILES} images wait in the inbox")
    copies: dict[str, list[Path]] = {}
    for path in files:
        try:
            with path.open("rb") as stream:
                uid = open_envelope(stream).sop_uid
        except (FileNotFoundError, Unreadable):  # moved by the intake meanwhile, or not received by the node
            continue
        if uid in wanted:
            copies.setdefault(uid, []).append(path)
    return copies


def check_copy(path: Path, reference: Reference, sha256: str | None = None) -> int:
    """Return SUCCESS when the file is complete and is that image, else the failure reason.

    With `sha256` (`part10.content_sha256`) the bytes must be those received. Without it, the header must be readable
    and the pixels complete; raises FileNotFoundError when the intake has moved the file meanwhile.
    """
    sop_class, sop_uid = reference
    try:
        if sha256 and content_sha256(path) != sha256:
            return PROCESSING_FAILURE
        with path.open("rb") as stream:
            ds = read_header(stream, open_envelope(stream).transfer_syntax, pixels=False).dataset
    except FileNotFoundError:
        if sha256 is None:
            raise
        return NO_SUCH_INSTANCE
    except OSError:
        return PROCESSING_FAILURE
    except Unreadable:  # quarantined as received: with the right hash it is all that was sent
        return SUCCESS if sha256 else PROCESSING_FAILURE
    if header.text(ds, "SOPInstanceUID") != sop_uid:
        return NO_SUCH_INSTANCE
    return SUCCESS if header.text(ds, "SOPClassUID") == sop_class else CLASS_CONFLICT
