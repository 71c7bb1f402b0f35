"""The ledger of the frozen site of version 0.1.0, migrated: new names, the same facts, the same audit, still append-only."""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from agent.ledger import audit, schema
from agent.ledger.database import Ledger
from agent.rounds import evaluation, records

SITE = Path(__file__).resolve().parents[2] / "sites" / "0.1.0"


@pytest.fixture
def old(tmp_path):
    """The frozen ledger, copied elsewhere and not opened yet."""
    for file in SITE.glob("ledger.db*"):
        shutil.copy(file, tmp_path)
    return tmp_path / "ledger.db"


def rows(path, sql):
    connection = sqlite3.connect(path)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def test_states_evaluations_and_verdicts_have_the_names_of_0_2_and_lose_nothing(old):
    (look,) = rows(old, "SELECT id, round, bundle, golden, alpha, at FROM look")
    ((before,),) = rows(old, "SELECT json FROM verdict")
    with Ledger(old) as ledger:
        assert [current.state for current in records.newest_first(ledger)] == [
            "paused",
            "inconclusive",
            "not_evaluated",
        ]
        (row,) = ledger.rows("SELECT * FROM evaluation")
        assert (row["id"], row["round"], row["bundle"], row["golden"], row["alpha"], row["at"]) == look
        assert row["champion"] == row["baseline"] == ledger.value("SELECT id FROM bundle WHERE is_baseline = 1")
        assert row["rules"] == ""  # version 0.1 did not record them
        after = records.newest_verdict(ledger, records.get(ledger, "r0002"))
        assert ledger.value("SELECT outcome FROM verdict") == after["outcome"] == "inconclusive"
        assert after["line"].startswith("inconclusive: ")
        assert "not_shown" not in json.dumps(after)
        assert before.replace("not_shown", "inconclusive").replace("not shown: ", "inconclusive: ") == json.dumps(
            after, sort_keys=True, separators=(",", ":"), ensure_ascii=False
        )
        tables = {row["name"] for row in ledger.rows("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert not tables & {"look", "golden_film", "verdict_0_2"}


def test_the_migrated_tables_are_still_append_only(old):
    with Ledger(old) as ledger:
        for table in ("evaluation", "verdict", "golden_image"):
            for statement in (f"DELETE FROM {table}", f"UPDATE {table} SET rowid = rowid + 1"):
                with pytest.raises(sqlite3.IntegrityError, match=f"{table} is append-only"), ledger.transaction():
                    ledger.run(statement)


def test_the_audit_chain_is_untouched(old):
    entries = rows(old, "SELECT * FROM audit ORDER BY seq")
    with Ledger(old) as ledger:
        verified = audit.verify(ledger, SITE / "audit.heads", (SITE / "keys" / "signing.pub").read_bytes())
    assert verified["ok"], verified
    assert rows(old, "SELECT * FROM audit ORDER BY seq") == entries


def test_a_passed_verdict_of_0_1_names_what_it_did_not_require_in_the_words_of_0_2():
    verdict = {
        "outcome": "passed",
        "line": "passed: non-inferior to champion and baseline on effusion; NOT SHOWN, not required: nodule AUC 0.8",
        "checks": [{"outcome": "not_shown"}, {"outcome": "non_inferior"}, {"outcome": "ok"}],
    }
    after = json.loads(schema.verdict_of_0_2(json.dumps(verdict)))
    assert after["line"].endswith("on effusion; INCONCLUSIVE, not required: nodule AUC 0.8")
    assert [check["outcome"] for check in after["checks"]] == ["inconclusive", "non_inferior", "ok"]
    assert after["outcome"] == "passed"


def test_an_evaluation_that_0_1_paid_and_did_not_finish_is_found_again(old):
    connection = sqlite3.connect(old)
    connection.execute("INSERT INTO look VALUES (2, 'r0001', 'b28de33b801b', 1, 0.004, '2026-11-30T17:00:00.000Z')")
    connection.execute("UPDATE round SET state = 'trained' WHERE name = 'r0001'")
    connection.commit()
    connection.close()
    with Ledger(old) as ledger:
        paid = evaluation._unfinished(ledger, records.get(ledger, "r0001"))
        assert paid is not None
        assert (paid.id, paid.bundle, paid.alpha, paid.comparison.golden) == (2, "b28de33b801b", 0.004, 1)
        assert paid.comparison.champion == ledger.value("SELECT id FROM bundle WHERE is_baseline = 1")
        assert evaluation._unfinished(ledger, records.get(ledger, "r0002")) is None
