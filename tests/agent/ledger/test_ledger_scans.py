"""No command of a person scans a ledger table that grows with the images."""

import re

from agent.erasure import forget
from agent.images import listing
from agent.service.status import status
from tests.support.agent.images import put, take_in, xray

GROWS = r"image|i|receipt|prediction|p|outbox|o|label|golden_image|kept_file|pulled|unscored|score_again"
NEWEST = re.compile(r"ORDER BY (\w+\.)?id DESC LIMIT \d+")  # by the key from its end: SQLite calls that a scan too


def full_scans(ledger, work):
    """Return (line of the query plan, statement) of each full scan."""
    statements = []
    ledger.db.set_trace_callback(statements.append)
    work()
    ledger.db.set_trace_callback(None)
    assert statements
    scans = []
    for sql in statements:
        if sql.lstrip().startswith(("SELECT", "UPDATE", "DELETE")):
            for row in ledger.rows(f"EXPLAIN QUERY PLAN {sql}"):
                newest = NEWEST.search(sql) and "state = " not in sql
                if re.match(rf"SCAN ({GROWS})\b", row["detail"]) and not newest:
                    scans.append((row["detail"], sql))
    return scans


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
