"""How commands speak: one JSON document on stdout with --json, else words for people; errors in one line.

Exit codes: 0 ok, 1 error, 2 refused by policy, 3 degraded.
"""

import json
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agent.errors import Problem, Refused
from agent.ledger.states import IllegalMove
from deploy.errors import BundleRefused, KeyRefused, PointerRefused, ServerDown, ServerRefused

WIDE = 160  # columns when the output is a file or a pipe: nothing is cut there
# Reasons, names and paths come from outside: "[/tls]" in them is text, neither a style nor an error.
people = Console(
    highlight=False, markup=False, emoji=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDE
)
logs = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def as_json(value: Any) -> None:
    """The one JSON document of a command."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def shown(value: Any) -> str:
    """A value for a person: six digits of a number with a fraction, nothing for None."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def pairs(rows: Iterable[tuple[str, Any]]) -> None:
    """Name and value, one a line."""
    grid = Table.grid(padding=(0, 2))
    for name, value in rows:
        grid.add_row(Text(name, style="bold"), shown(value))
    people.print(grid)


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]], title: str | None = None) -> None:
    """A table with a head."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*map(shown, row))
    people.print(made)


@contextmanager
def errors() -> Iterator[None]:
    """Turn what can go wrong into one line on stderr and the right exit code."""
    try:
        yield
    except (Refused, BundleRefused, IllegalMove) as error:
        logs.print(f"refused: {error}")
        raise typer.Exit(2) from None
    except (Problem, KeyRefused, PointerRefused, ServerDown, ServerRefused) as error:
        logs.print(f"error: {error}")
        raise typer.Exit(1) from None
    except OSError as error:
        logs.print(f"error: {error}")
        raise typer.Exit(1) from None
    except sqlite3.DatabaseError as error:
        if type(error) not in (sqlite3.DatabaseError, sqlite3.OperationalError):
            raise  # a fault of ours
        hint = "" if isinstance(error, sqlite3.OperationalError) else "; restore it from the backup (docs/operating.md)"
        logs.print(f"error: ledger.db: {error}{hint}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        logs.print("interrupted; what was done is kept, and the same command goes on from there")
        raise typer.Exit(1) from None
