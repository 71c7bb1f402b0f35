"""No question that a person asks walks a table of the ledger that grows with the images: a million of them cost nothing."""

import re

from agent.erasure import forget
from agent.images import listing
from agent.service.status import status
from tests.support.agent.images import put, take_in, xray

GROWS = r"image|i|receipt|prediction|p|outbox|o|label|golden_image|kept_file|pulled|unscored|score_again"
NEWEST = re.compile(r"ORDER BY (\w+\.)?id DESC LIMIT \d+")  # by the key from its end: SQLite calls that a scan too


def walked(ledger, work):
    """The (line of the plan, statement) of each walk from end to end."""
    asked = []
    ledger.db.conn.set_trace_callback(asked.append)
    work()
    ledger.db.conn.set_trace_callback(None)
    assert asked
    found = []
    for sql in asked:
        if sql.lstrip().startswith(("SELECT", "UPDATE", "DELETE")):
            for row in ledger.rows(f"EXPLAIN QUERY PLAN {sql}"):
                newest = NEWEST.search(sql) and "state = " not in sql
                if re.match(rf"SCAN ({GROWS})\b", row["detail"]) and not newest:
                    found.append((row["detail"], sql))
    return found


def test_forget_reads_no_rows_but_the_patients(site):
    with site.ledger() as ledger:
        for seed in range(3):
            put(site, xray(seed, patient="P1" if seed else "P2"), f"{seed}.dcm")
        take_in(site, ledger)
        keys = forget.pseudonyms_of(site, "P1", ())
        assert walked(ledger, lambda: forget.preview(site, ledger, keys)) == []
        assert walked(ledger, lambda: forget.forget(site, ledger, keys, "Dr Osei", "asked for it", True)) == []
        assert ledger.value("SELECT count(*) FROM image WHERE reason = 'forgotten'") == 2


def test_listing_and_status_read_no_more_rows_than_they_show(site):
    with site.ledger() as ledger:
        assert walked(ledger, lambda: status(site, ledger)) == []
        for state in (None, *listing.STATES[1:]):
            assert walked(ledger, lambda state=state: listing.newest(site, ledger, state, 50)) == []
