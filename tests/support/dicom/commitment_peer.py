"""A storage commitment SCU, and running sites with that SCU as their peer."""

import threading
from contextlib import contextmanager

from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, evt

from agent.network.node import listen
from dicom.client.sender import echo
from dicom.dataset.facts import COMMITMENT_INSTANCE, SECONDARY_CAPTURE, STORAGE_COMMITMENT
from dicom.dataset.part10 import EXPLICIT_LE
from dicom.node.commitment import SUCCESS
from tests.conftest import make_site
from tests.support.dicom.pacs import associate, wait_for
from tests.support.ports import free_port

ABSENT = (SECONDARY_CAPTURE, "1.2.3.4.5.6.7.8.9")


class CommitmentScu:
    """Sends N-ACTION, and accepts N-EVENT-REPORT on its own port while it is open."""

    def __init__(self, port=None, answer=SUCCESS):
        self.port, self.answer = port or free_port(), answer
        self.reports: list[tuple[int, Dataset]] = []
        self.server = None

    def open(self, context=None):
        entity = AE("PACS")
        entity.add_supported_context(STORAGE_COMMITMENT, EXPLICIT_LE, scu_role=False, scp_role=True)
        handlers = [(evt.EVT_N_EVENT_REPORT, self._reported)]
        where = ("127.0.0.1", self.port)
        self.server = entity.start_server(where, block=False, evt_handlers=handlers, ssl_context=context)
        return self

    def close(self):
        if self.server:
            self.server.shutdown()

    def _reported(self, event):
        self.reports.append((event.event_type, event.event_information))
        return self.answer, None

    def request(self, port, references, transaction=None, action=1, instance=COMMITMENT_INSTANCE, calling="PACS"):
        """Send an N-ACTION for these (class, instance) pairs and return its status."""
        information = Dataset()
        information.TransactionUID = transaction or generate_uid()
        information.ReferencedSOPSequence = []
        for sop_class, sop_uid in references:
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, sop_uid
            information.ReferencedSOPSequence.append(item)
        association = associate(port, [(STORAGE_COMMITMENT, EXPLICIT_LE)], calling=calling)
        assert association.is_established
        status, _ = association.send_n_action(information, action, STORAGE_COMMITMENT, instance)
        association.release()
        return status.Status

    def last_report(self, count=1):
        """Return the newest report as (event type, committed UIDs, {UID: reason}) once there are `count`."""
        assert wait_for(lambda: len(self.reports) >= count)
        event_type, information = self.reports[-1]
        committed = {item.ReferencedSOPInstanceUID for item in information.get("ReferencedSOPSequence", [])}
        failed = {
            item.ReferencedSOPInstanceUID: item.FailureReason for item in information.get("FailedSOPSequence", [])
        }
        return event_type, committed, failed


def references(*datasets):
    """Return (SOP class, SOP instance) of each data set."""
    return [(ds.SOPClassUID, ds.SOPInstanceUID) for ds in datasets]


@contextmanager
def running_sites(folder):
    """Yield a function that starts the node of a site whose peer is a CommitmentScu; it returns (site, port)."""
    stops = []

    def start(pacs, site=None, **keys):
        site = site or make_site(folder / "site", node={"peers": [f"PACS@127.0.0.1:{pacs.port}"]} | keys)
        stop = threading.Event()
        thread = threading.Thread(target=listen, args=(site, stop))
        thread.start()
        stops.append((stop, thread))
        port = site.config.node.port
        assert wait_for(lambda: echo("127.0.0.1", port, "CXRLOOP"))
        return site, port

    try:
        yield start
    finally:
        for stop, thread in stops:
            stop.set()
            thread.join()


def pending_requests(site):
    """Return the files of requests without an accepted report."""
    return list((site.root / "node" / "commitment").glob("*.json"))
