"""How commands speak to people: what comes from outside is printed as it is."""

import pytest

from agent import out

WORDS = "host:104[/tls] if [results] says so [/] :warning:"


@pytest.mark.parametrize(
    "say",
    [
        lambda: out.people.print(f"site made in {WORDS}"),
        lambda: out.pairs([(WORDS, 1)]),
        lambda: out.pairs([("reason", WORDS)]),
        lambda: out.table(("state", "reason"), [("rejected", WORDS)]),
    ],
    ids=["a line", "a name", "a value", "a cell"],
)
def test_brackets_and_colons_are_words_and_no_styles(say, capsys):
    say()
    assert WORDS in capsys.readouterr().out


def test_a_number_with_a_fraction_has_six_digits_and_nothing_is_empty(capsys):
    out.pairs([("threshold", 0.12345678901234567), ("films", 12345678), ("served", None)])
    said = capsys.readouterr().out.split("\n")
    assert [line.split() for line in said[:3]] == [["threshold", "0.123457"], ["films", "12345678"], ["served"]]
