"""Is this image still here, byte for byte? The checks behind storage commitment, on files alone.

Reads headers and hashes, changes nothing; which files there should be is the ledger's business, not this one's.
"""

from pathlib import Path

from dicom.dataset import header
from dicom.dataset.part10 import content_sha256, open_envelope, read_header
from dicom.errors import LookupFailed, Unreadable
from dicom.node.commitment import CLASS_CONFLICT, NO_SUCH_INSTANCE, PROCESSING_FAILURE, SUCCESS, Reference
from dicom.store.inbox import Inbox

MOST_WAITING = 20_000  # files of an inbox that are looked at for one request: some seconds


def inbox_copies(inbox: Inbox, wanted: set[str]) -> dict[str, list[Path]]:
    """Files of the inbox by SOP instance UID (of their file meta), of the wanted ones. Raises LookupFailed."""
    files = inbox.waiting(MOST_WAITING + 1)
    if len(files) > MOST_WAITING:
        raise LookupFailed(f"more than {MOST_WAITING} images wait in the inbox")
    found: dict[str, list[Path]] = {}
    for path in files:
        try:
            with path.open("rb") as stream:
                uid = open_envelope(stream).sop_uid
        except (FileNotFoundError, Unreadable):  # taken in meanwhile; or not from the network: the ledger will know it
            continue
        if uid in wanted:
            found.setdefault(uid, []).append(path)
    return found


def check_copy(path: Path, reference: Reference, sha256: str | None = None) -> int:
    """SUCCESS when the file is whole and is that image, else the reason why not.

    With `sha256` (`part10.content_sha256`) the bytes are those that came in. Without, the header must read and the
    pixels be there in full; a file that the intake took away meanwhile is a FileNotFoundError.
    """
    sop_class, sop_uid = reference
    try:
        if sha256 and content_sha256(path) != sha256:
            return PROCESSING_FAILURE
        with path.open("rb") as stream:
            found = read_header(stream, open_envelope(stream).transfer_syntax, pixels=False).dataset
    except FileNotFoundError:
        if sha256 is None:
            raise
        return NO_SUCH_INSTANCE
    except OSError:
        return PROCESSING_FAILURE
    except Unreadable:  # set aside as it came: with its hash right it is all that was ever sent
        return SUCCESS if sha256 else PROCESSING_FAILURE
    if header.text(found, "SOPInstanceUID") != sop_uid:
        return NO_SUCH_INSTANCE
    return SUCCESS if header.text(found, "SOPClassUID") == sop_class else CLASS_CONFLICT
