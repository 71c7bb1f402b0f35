"""A Storage SCP in this process for tests: keeps and counts objects, and refuses them on demand."""

import ssl
from collections.abc import Callable

from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import (  # pyright: ignore[reportAttributeAccessIssue]
    ComprehensiveSRStorage,
    SecondaryCaptureImageStorage,
)


class Archive:
    """A context manager; `held` maps SOP Instance UIDs to data sets, `arrivals` lists the UID of every C-STORE."""

    def __init__(
        self,
        port: int,
        verdict: Callable[[Dataset], int] = lambda ds: 0,
        classes: tuple[str, ...] = (ComprehensiveSRStorage, SecondaryCaptureImageStorage),
        context: ssl.SSLContext | None = None,
    ):
        self.port, self.verdict, self.classes, self.context = port, verdict, classes, context
        self.held: dict[str, Dataset] = {}
        self.arrivals: list[str] = []
        self.associations = 0

    def __enter__(self) -> "Archive":
        entity = AE("PACS")
        entity.require_called_aet = True
        for name in self.classes:
            entity.add_supported_context(name, ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"])
        handlers = [(evt.EVT_C_STORE, self._store), (evt.EVT_ACCEPTED, self._accepted)]
        self.server = entity.start_server(
            ("127.0.0.1", self.port), block=False, evt_handlers=handlers, ssl_context=self.context
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()

    def _accepted(self, event: evt.Event) -> None:
        self.associations += 1

    def _store(self, event: evt.Event) -> int:
        ds = event.dataset
        ds.file_meta = event.file_meta
        self.arrivals.append(str(ds.SOPInstanceUID))
        status = self.verdict(ds)
        if status == 0 or status >> 12 == 0xB:
            self.held[str(ds.SOPInstanceUID)] = ds
        return status


def text_of(item: Dataset) -> list[str]:
    """Return every text, code and number of a content tree."""
    texts = [str(item.get("TextValue", ""))]
    texts += [code.CodeMeaning for code in item.get("ConceptCodeSequence", [])]
    texts += [str(number.NumericValue) for number in item.get("MeasuredValueSequence", [])]
    for child in item.get("ContentSequence", []):
        texts += text_of(child)
    return [text for text in texts if text]
