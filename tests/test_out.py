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
