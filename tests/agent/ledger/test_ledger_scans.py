"""No command of a person scans a ledger table that grows with the images."""

from agent.erasure import forget
from agent.images import listing
from agent.service.status import status
from tests.support.agent.images import put, take_in, xray
from tests.support.agent.scans import full_scans


def test_forget_reads_no_rows_but_the_patients(site):
    with site.ledger() as ledger:
        for seed in range(3):
            put(site, xray(seed, patient="P1" if seed else "P2"), f"{seed}.dcm")
        take_in(site, ledger)
        keys = forget.pseudonyms_of(site, "P1", ())
        assert full_scans(ledger, lambda: forget.preview(site, ledger, keys)) == []
        assert full_scans(ledger, lambda: forget.forget(site, ledger, keys, "Dr Osei", "asked for it", True)) == []
        assert ledger.value("SELECT count(*) FROM image WHERE reason = 'forgotten'") == 2


def test_listing_and_status_read_no_more_rows_than_they_show(site):
    with site.ledger() as ledger:
        assert full_scans(ledger, lambda: status(site, ledger)) == []
        for state in (None, *listing.STATES[1:]):
            assert full_scans(ledger, lambda state=state: listing.newest(site, ledger, state, 50)) == []
