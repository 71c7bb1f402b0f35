"""How commands speak to people: what comes from outside is printed as it is."""

import sqlite3

import pytest
import typer

from agent import console
from agent.errors import Problem
from agent.images import export, listing
from agent.results import explain
from agent.results.rerun import rerun

WORDS = "host:104[/tls] if [results] says so [/] :warning:"


@pytest.mark.parametrize(
    "say",
    [
        lambda: console.people.print(f"site made in {WORDS}"),
        lambda: console.pairs([(WORDS, 1)]),
        lambda: console.pairs([("reason", WORDS)]),
        lambda: console.table(("state", "reason"), [("rejected", WORDS)]),
    ],
    ids=["a line", "a name", "a value", "a cell"],
)
def test_brackets_and_colons_are_words_and_no_styles(say, capsys):
    say()
    assert WORDS in capsys.readouterr().out


def test_a_number_with_a_fraction_has_six_digits_and_nothing_is_empty(capsys):
    console.pairs([("threshold", 0.12345678901234567), ("images", 12345678), ("served", None)])
    said = capsys.readouterr().out.split("\n")
    assert [line.split() for line in said[:3]] == [["threshold", "0.123457"], ["images", "12345678"], ["served"]]


@pytest.mark.parametrize("number", ["99999999999999999999", "\u00b2", "1.2", ""])
def test_what_is_no_image_number_names_no_image(site, tmp_path, number):
    with site.ledger() as ledger:
        for ask in (
            lambda: rerun(ledger, number, None, False, "a test"),
            lambda: export.export(site, ledger, [number], tmp_path / "out", False, "a test"),
            lambda: explain.explain(site, ledger, number, None, "heatmap", None, None),
        ):
            with pytest.raises(Problem, match=r"no (stored )?image with this SOP Instance UID"):
                ask()


@pytest.mark.parametrize(("first", "says"), [(100, "malformed"), (0, "not a database")])
def test_a_damaged_ledger_is_said_in_one_line(site, capsys, first, says):
    with site.ledger() as ledger:
        ledger.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray((site.root / "ledger.db").read_bytes())
    content[first:3000] = b"\xff" * (3000 - first)
    (site.root / "ledger.db").write_bytes(content)
    with pytest.raises(typer.Exit) as ended, console.errors(), site.ledger() as ledger:
        listing.newest(site, ledger, None, 10)
    said = capsys.readouterr().err
    assert ended.value.exit_code == 1 and said.startswith("error: ledger.db: ") and said.count("\n") == 1
    assert says in said and "restore it from the backup" in said


def test_a_fault_of_ours_is_no_damaged_ledger(site):
    with pytest.raises(sqlite3.IntegrityError), console.errors(), site.ledger() as ledger, ledger.transaction():
        ledger.insert("site", key="one", value=None)
