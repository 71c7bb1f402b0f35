"""Finds the statements that read a whole table of the ledger."""

import re

GROWS = r"image|i|receipt|prediction|p|outbox|o|label|golden_image|kept_file|pulled|unscored|score_again|pool_image|pool_band"
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
