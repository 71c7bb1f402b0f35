"""The audit finds every edit, deletion, insertion, reordering and truncation."""

import pytest

from agent.ledger import audit
from agent.ledger.database import Ledger

TRIGGERS = ("audit_no_update", "audit_no_delete")


@pytest.fixture
def trail(site):
    with site.ledger() as ledger:
        for n in range(5):
            with ledger.transaction():
                audit.append(ledger, "someone", f"act {n}", "because", before=n, after=n + 1)
            site.anchor(ledger)
        yield site, ledger


def verify(site, ledger, head=None):
    return audit.verify(ledger, site.root / "audit.heads", site.key("signing.pub"), head)


def tamper(ledger: Ledger, sql: str) -> None:
    """Change the table as someone with the file and a SQL shell would."""
    for name in TRIGGERS:
        ledger.db.execute(f"DROP TRIGGER {name}")
    ledger.db.execute(sql)


def test_an_untouched_chain_verifies_and_contains_every_head_it_ever_had(trail):
    site, ledger = trail
    result = verify(site, ledger)
    assert result["ok"]
    assert result["entries"] == 6  # init and five acts
    for row in ledger.rows("SELECT hash FROM audit"):
        assert verify(site, ledger, row["hash"])["ok"]
    assert not verify(site, ledger, "0" * 64)["ok"]


@pytest.mark.parametrize(
    ("sql", "named"),
    [
        ("UPDATE audit SET why = 'nothing' WHERE seq = 3", "entry 3 was changed"),
        ("DELETE FROM audit WHERE seq = 3", "entry 3 is missing"),
        ("DELETE FROM audit WHERE seq >= 5", "entry 5 was signed"),
        ("DELETE FROM audit", "entry 1 was signed"),
        ("UPDATE audit SET seq = CASE seq WHEN 2 THEN -3 WHEN 3 THEN -2 ELSE seq END", "entry 1"),
        (
            "INSERT INTO audit SELECT 7, at, who, what, why, before, after, previous, hash FROM audit WHERE seq = 6",
            "entry 7",
        ),
    ],
)
def test_any_change_is_found_and_named(trail, sql, named):
    site, ledger = trail
    tamper(ledger, sql)
    result = verify(site, ledger)
    assert not result["ok"]
    assert named in result["broken"]


def test_a_chain_rewritten_as_a_whole_is_found_by_the_signed_heads(trail):
    site, ledger = trail
    tamper(ledger, "DELETE FROM audit")
    with ledger.transaction():
        audit.append(ledger, "an intruder", "a new history", "to hide")
    result = verify(site, ledger)
    assert not result["ok"]
    assert "signed" in result["broken"]


def test_heads_signed_by_another_key_are_refused(trail):
    site, ledger = trail
    heads = site.root / "audit.heads"
    lines = heads.read_text().splitlines()
    heads.write_text("\n".join([*lines[:-1], lines[-1][:-4] + "0000"]) + "\n")
    assert "not signed by this appliance" in verify(site, ledger)["broken"]


def test_missing_heads_are_named(trail):
    site, ledger = trail
    (site.root / "audit.heads").unlink()
    assert "is missing" in verify(site, ledger)["broken"]
