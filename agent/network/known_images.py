"""Images that `cxrloop pull` need not fetch, because they are in the inbox or in the ledger; and the patients' ids.

Must not write anything: inbox and ledger are the only record of what was fetched.
"""

from collections.abc import Iterator
from pathlib import Path

from agent.ledger.database import Ledger
from agent.site.site import Site
from dicom.dataset import header
from dicom.dataset.part10 import open_envelope, read_header
from dicom.errors import Unreadable
from dicom.pseudonyms import PLACEHOLDERS


class KnownImages:
    """The images in the inbox and in the ledger, by SOP Instance UID. Reads the header of each inbox file once."""

    def __init__(self, site: Site, ledger: Ledger) -> None:
        self._site, self._ledger = site, ledger
        self._inbox: dict[str, str] = {}  # file name -> SOP Instance UID, "" for an unreadable file

    def __contains__(self, sop_uid: str) -> bool:
        if self._in_ledger(sop_uid):
            return True
        self.count_inbox()
        # The intake writes the row before it deletes the inbox file: in this order no image is overlooked.
        return sop_uid in self._inbox.values() or self._in_ledger(sop_uid)

    def count_inbox(self) -> int:
        """Return the number of files in the inbox; read the headers of the new ones."""
        paths = {path.name: path for path in self._site.inbox.folder.glob("*.dcm")}
        self._inbox = {
            name: self._inbox[name] if name in self._inbox else _sop_uid(path) for name, path in paths.items()
        }
        return len(paths)

    def _in_ledger(self, sop_uid: str) -> bool:
        return self._ledger.row("SELECT 1 FROM image WHERE sop_uid = ? LIMIT 1", sop_uid) is not None


def _sop_uid(path: Path) -> str:
    """Return the SOP Instance UID of a file; "" when it is unreadable or was just taken in."""
    try:
        with path.open("rb") as stream:
            syntax = open_envelope(stream).transfer_syntax
            return header.text(read_header(stream, syntax, pixels=False).dataset, "SOPInstanceUID")
    except (Unreadable, FileNotFoundError):
        return ""


def patient_ids(site: Site, ledger: Ledger) -> Iterator[str | None]:
    """Yield the patient id of every patient in the ledger, from the newest original; None where no original is left.

    The ledger holds pseudonyms only, which can't be turned back into patient ids.
    """
    newest = (
        "SELECT original FROM image WHERE id IN (SELECT max(id) FROM image "
        "WHERE patient_key LIKE 'p%' AND plate IS NOT NULL AND heartbeat = 0 GROUP BY patient_key) ORDER BY id DESC"
    )
    for row in ledger.rows(newest):
        try:
            with site.store.path(row["original"]).open("rb") as stream:
                dataset = read_header(stream, open_envelope(stream).transfer_syntax, pixels=False).dataset
        except (Unreadable, OSError, ValueError):
            yield None
            continue
        patient = header.text(dataset, "PatientID")
        yield patient if patient and patient.upper() not in PLACEHOLDERS else None
