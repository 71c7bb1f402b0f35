"""The glossary is held: words that were retired do not come back into what a person reads.

Checked are the strings of the program (messages, help texts, comments of settings) and the pages of the documentation.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("agent", "dicom", "learner", "deploy", "cxrloop")
RETIRED = {  # pattern -> what to write in its place
    r"(?<!digitised )\bfilms?\b": "image",
    r"\b(?:a|an|no|the|this|one|each|first|next|another|spent|per|of) looks?\b(?!-)": "evaluation",
    r"\blooks (?:left|planned|spent|a year|per year)\b": "evaluations",
    r"\blook (?:is due|spent|decides|left)\b": "evaluation",
    r"(?<!=)\bnot[_ ]shown\b(?! better)": "inconclusive",
    r"\bno[_ ]look\b": "not_evaluated",
    r"\bspeaks? for\b": "evidence for",
    r"\bseats?\b": "association",
    r"\bgo(?:es)? on with\b": "resume",
    r"\bbegins? anew\b": "start fresh",
    r"\b(?:has|have) its say\b": "(name the rule)",
    r"\bwithout a word\b": "without a message",
    r"\bclose the door\b": "reject",
    r"\blottery\b": "varies strongly by seed",
    r"\bturn the sign\b": "hysteresis",
    r"\bat home\b": "through loopback",
    r"\brefuses? to know\b": "must not import",
}
OLD_NAMES = {  # the only places where a retired word may stand: they read what 0.1 wrote
    "agent/ledger/schema_0_1.py",
    "agent/ledger/schema.py",
    "learner/round/manifest.py",
}


def visible_strings(path: Path) -> list[tuple[int, str]]:
    """Line and text of every string constant of a file, docstrings included."""
    tree = ast.parse(path.read_text("utf-8"))
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
    ]


def retired_words(text: str) -> list[str]:
    return [
        f"{match[0]!r}, write {word!r}"
        for pattern, word in RETIRED.items()
        for match in re.finditer(pattern, text, re.I)
    ]


def source_files() -> list[Path]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return [path for path in files if str(path.relative_to(ROOT)) not in OLD_NAMES]


def pages() -> list[Path]:
    """The pages that describe the program as it is; a changelog names what was before."""
    top = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md")]
    return [*top, *(ROOT / "docs").glob("*.md"), ROOT / "deploy" / "appliance.example.toml"]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_string_of_the_program_uses_a_retired_word(package):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {word}"
        for path in source_files()
        if path.relative_to(ROOT).parts[0] == package
        for line, text in visible_strings(path)
        for word in retired_words(text)
    ]
    assert not wrong, "\n".join(wrong)


def present_lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines of a page without the table that maps names of 0.1 to names of 0.2."""
    lines, in_table = [], False
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        in_table = line.startswith("| 0.1 | 0.2 |") or (in_table and line.startswith("|"))
        if not in_table:
            lines.append((number, line))
    return lines


def test_no_page_uses_a_retired_word():
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {word}"
        for path in pages()
        for number, line in present_lines(path)
        for word in retired_words(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_check_finds_a_retired_word_and_leaves_plain_ones():
    assert retired_words("no look is due for this film") != []
    assert retired_words("the next evaluation of 3 images; look at the log; where it looked") == []


def test_every_term_that_replaces_a_retired_one_is_in_the_glossary():
    glossary = (ROOT / "docs" / "glossary.md").read_text("utf-8").lower()
    terms = ("image", "evaluation", "inconclusive", "not_evaluated", "association", "resume", "hysteresis")
    assert [term for term in terms if term not in glossary] == []
