"""How commands write: one JSON document on stdout with --json, else text for people; errors in one line on stderr.

Exit codes: 0 ok, 1 error, 2 refused by policy, 3 degraded. Lines are broken between words to the width of the terminal;
a table that is too wide for it becomes one "name  value" block per row.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import typer

from agent.errors import Problem, Refused
from deploy.errors import BundleRefused, KeyRefused, PointerRefused, ServerDown, ServerRefused

if TYPE_CHECKING:
    from typing import TextIO

WIDE = 160  # columns when the output is a file or a pipe
GAP = 2  # blanks between two columns
TALLEST = 6  # lines of a cell; a table that needs more is easier to read in blocks
NARROWEST = 20  # columns that a value needs beside its name
WORD = re.compile(r"\[[^\[\]]{1,30}\]\S*|\S+")  # an interval such as [-0.012, +0.034] counts as one word
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z")  # as the ledger writes it
BOLD, PLAIN = "\x1b[1m", "\x1b[0m"


class Progress(Protocol):
    """A line that shows how far a long command is."""

    def update(self, text: str) -> None: ...


class Stream:
    """Standard output or standard error, for text that people read."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def file(self) -> TextIO:
        return getattr(sys, self.name)

    def print(self, text: str = "", style: str = "") -> None:
        """Write a text; at a terminal its lines are broken between words. `style` is "" or "bold"."""
        text = printable(text)
        if self.file.isatty():
            text = "\n".join(wrapped(text, width()))
        self.file.write(self.bold(text) + "\n" if style == "bold" else text + "\n")

    def bold(self, text: str) -> str:
        """Return the text in bold where the stream is a terminal that can show it."""
        plain = not self.file.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        return text if plain or not text else f"{BOLD}{text}{PLAIN}"

    @contextmanager
    def status(self, text: str) -> Iterator[Progress]:
        """Show a progress line while the block runs; nothing is shown where the stream is no terminal."""
        if not self.file.isatty():
            yield _Silent()
            return
        from rich.console import Console
        from rich.text import Text

        with Console(stderr=self.name == "stderr").status(Text(text)) as spinner:
            yield _Spinner(spinner)


class _Silent:
    def update(self, text: str) -> None:
        """Show nothing."""


class _Spinner:
    def __init__(self, spinner: Any) -> None:
        self.spinner = spinner

    def update(self, text: str) -> None:
        from rich.text import Text

        self.spinner.update(Text(text))  # never a plain string: rich reads "[/tls]" in it as a style


people, logs = Stream("stdout"), Stream("stderr")


def width() -> int:
    """Return the columns that a line may take: $COLUMNS, else those of the terminal, else WIDE."""
    return shutil.get_terminal_size((WIDE, 24)).columns


def as_json(value: Any) -> None:
    """Write the one JSON document of a command."""
    import json

    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def shown(value: Any) -> str:
    """Return a value for a person: six digits of a fraction, times to the second, yes or no, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = printable(str(value))
    return text[:19] + "Z" if TIME.fullmatch(text) else text


def printable(text: str) -> str:
    """Return the text with control characters replaced: values come from outside and must not steer the terminal."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c == "\n" else " " if c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def cells(text: str) -> int:
    """Return the columns that a text takes in a terminal."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def wrapped(text: str, columns: int) -> list[str]:
    """Return the lines of a text, broken between words; a word that is longer than `columns` keeps a line of its own."""
    lines: list[str] = []
    for line in text.split("\n"):
        if cells(line) <= columns:
            lines.append(line)
            continue
        current = ""
        for word in WORD.findall(line):
            if not current:
                current = word
            elif cells(current) + 1 + cells(word) <= columns:
                current += " " + word
            else:
                lines.append(current)
                current = word
        lines.append(current)
    return lines


def pairs(rows: Iterable[tuple[str, Any]]) -> None:
    """Write names and values, one pair a line; long values go on below themselves."""
    people.file.write("".join(_block([(printable(name), shown(value)) for name, value in rows])))


def _block(rows: list[tuple[str, str]]) -> Iterator[str]:
    """Yield the lines of names and values."""
    indent = max((cells(name) for name, _ in rows), default=0) + GAP
    if width() - indent < NARROWEST:
        indent = GAP
    for name, value in rows:
        first, *more = wrapped(value, width() - indent)
        if cells(name) + GAP > indent:
            yield people.bold(name) + "\n"
            more = [first, *more]
        else:
            yield (people.bold(name) + " " * (indent - cells(name)) + first).rstrip() + "\n"
        yield from (" " * indent + line + "\n" for line in more)


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]], title: str | None = None) -> None:
    """Write a table with a head, or one block per row where the terminal is too narrow for all columns."""
    heads, body = list(columns), [[shown(value) for value in row] for row in rows]
    filled = [n for n in range(len(heads)) if not body or any(row[n] for row in body)]  # empty columns are left out
    heads, body = [heads[n] for n in filled], [[row[n] for n in filled] for row in body]
    if title:
        people.print(title)
    widths = _widths([heads, *body])
    if widths is None:
        for number, row in enumerate(body):
            values = [(head, value) for head, value in zip(heads, row, strict=True) if value]
            people.file.write("\n" * (number > 0) + "".join(_block(values)))
        return
    for number, row in enumerate([heads, *body]):
        for line in _row(row, widths):
            people.file.write((people.bold(line) if number == 0 else line) + "\n")


def _row(row: list[str], widths: list[int]) -> Iterator[str]:
    """Yield the lines of one row of a table."""
    columns = [wrapped(value, columns) for value, columns in zip(row, widths, strict=True)]
    for n in range(max(map(len, columns))):
        parts = [column[n] if n < len(column) else "" for column in columns]
        padded = (part + " " * (wide - cells(part)) for part, wide in zip(parts, widths, strict=True))
        yield (" " * GAP).join(padded).rstrip()


def _widths(table: list[list[str]]) -> list[int] | None:
    """Return the width of each column, or None when they don't fit without breaking a word."""
    columns = list(zip(*table, strict=True))
    natural = [max(cells(line) for value in column for line in value.split("\n")) for column in columns]
    room = width() - GAP * (len(columns) - 1)
    if sum(natural) <= room:
        return natural
    least = [max((cells(word) for value in column for word in WORD.findall(value)), default=0) for column in columns]
    if sum(least) > room:
        return None
    # The narrow columns keep their natural width; the wide ones share what is left alike.
    limit = max(n for n in range(max(natural) + 1) if _total(natural, least, n) <= room)
    widths = [min(full, max(needed, limit)) for full, needed in zip(natural, least, strict=True)]
    tallest = max(len(wrapped(value, wide)) for row in table for value, wide in zip(row, widths, strict=True))
    return widths if tallest <= TALLEST else None


def _total(natural: list[int], least: list[int], limit: int) -> int:
    return sum(min(full, max(needed, limit)) for full, needed in zip(natural, least, strict=True))


@contextmanager
def errors() -> Iterator[None]:
    """Turn what can go wrong into one line on stderr and the right exit code."""
    import sqlite3

    try:
        yield
    except (Refused, BundleRefused) as error:
        logs.print(f"refused: {error}")
        raise typer.Exit(2) from None
    except (Problem, KeyRefused, PointerRefused, ServerDown, ServerRefused, OSError) as error:
        logs.print(f"error: {error}")
        raise typer.Exit(1) from None
    except sqlite3.DatabaseError as error:
        if type(error) not in (sqlite3.DatabaseError, sqlite3.OperationalError):
            raise  # a fault of ours
        hint = "" if isinstance(error, sqlite3.OperationalError) else "; restore it from the backup (docs/backup.md)"
        logs.print(f"error: ledger.db: {error}{hint}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        logs.print("interrupted; what was done is kept, and the same command resumes there")
        raise typer.Exit(1) from None
