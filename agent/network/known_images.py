"""What is here already: images by SOP Instance UID, in the inbox or in the ledger; and whose they are.

The files are the truth, so nothing that was fetched is written down anywhere else. Writes nothing.
"""

from collections.abc import Iterator
from pathlib import Path

from agent.ledger.database import Ledger
from agent.site.site import Site
from dicom.dataset import header
from dicom.dataset.part10 import Unreadable, open_envelope, read_header
from dicom.pseudonyms import PLACEHOLDERS


class Here:
    """Call it with a UID; remembers what it has read of the inbox, each file once."""

    def __init__(self, site: Site, ledger: Ledger) -> None:
        self._site, self._ledger = site, ledger
        self._inbox: dict[str, str] = {}  # file name -> SOP Instance UID, "" for an unreadable one

    def __call__(self, sop_uid: str) -> bool:
        """True when the image waits in the inbox or is in the ledger, whatever became of it there."""
        if self._known(sop_uid):
            return True
        self.waiting()
        # an image leaves the inbox after its row is written: looked at in this order, none slips through
        return sop_uid in self._inbox.values() or self._known(sop_uid)

    def waiting(self) -> int:
        """How many files wait in the inbox; reads the header of those that are new."""
        paths = {path.name: path for path in self._site.inbox.folder.glob("*.dcm")}
        self._inbox = {
            name: self._inbox[name] if name in self._inbox else _sop_uid(path) for name, path in paths.items()
        }
        return len(paths)

    def _known(self, sop_uid: str) -> bool:
        return self._ledger.row("SELECT 1 FROM image WHERE sop_uid = ? LIMIT 1", sop_uid) is not None


def _sop_uid(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            syntax = open_envelope(stream).transfer_syntax
            return header.text(read_header(stream, syntax, pixels=False).dataset, "SOPInstanceUID")
    except (Unreadable, FileNotFoundError):  # or taken in a moment ago
        return ""


def patient_ids(site: Site, ledger: Ledger) -> Iterator[str | None]:
    """The patient id of every patient in the ledger, from the newest original; None where no original is left.

    The ledger itself holds pseudonyms only, and they can't be undone.
    """
    newest = (
        "SELECT original FROM image WHERE id IN (SELECT max(id) FROM image "
        "WHERE patient_key LIKE 'p%' AND plate IS NOT NULL AND heartbeat = 0 GROUP BY patient_key) ORDER BY id DESC"
    )
    for row in ledger.rows(newest):
        try:
            with site.store.path(row["original"]).open("rb") as stream:
                found = read_header(stream, open_envelope(stream).transfer_syntax, pixels=False).dataset
        except (Unreadable, OSError, ValueError):
            yield None
            continue
        patient = header.text(found, "PatientID")
        yield patient if patient and patient.upper() not in PLACEHOLDERS else None
