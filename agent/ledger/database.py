"""The one SQLite file: opening it, and the one way to write to it.

Reads are autocommitted; every write happens in `transaction()`, which takes the write lock at once
(BEGIN IMMEDIATE), so that a read-then-write never fails half-way with "database is locked".
"""

import fcntl
import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LATEST = "names_of_0_2"  # the newest migration of agent.ledger.schema: a ledger that has it needs none
BUSY_MS = 30_000  # longer than any of our transactions, shorter than a person's patience


class Ledger:
    """A connection to the ledger; one per thread. Creates and migrates the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.db.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
        with (path.parent / (path.name + ".lock")).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two processes starting at once must not both create the tables
            self.db.execute("PRAGMA journal_mode = WAL")
            if not self._is_current():
                from sqlite_utils import Database  # only to migrate: it takes longer to load than most commands to run

                from agent.ledger.schema import migrations

                migrations.apply(Database(self.db))
        self.db.execute("PRAGMA synchronous = FULL")  # NORMAL may lose the last approvals in a power cut
        self.db.execute("PRAGMA foreign_keys = ON")
        self.db.execute("PRAGMA recursive_triggers = ON")  # else INSERT OR REPLACE deletes from append-only tables

    def _is_current(self) -> bool:
        newest = "SELECT name FROM _sqlite_migrations WHERE migration_set = 'cxrloop' ORDER BY id DESC LIMIT 1"
        try:
            return self.value(newest) == LATEST
        except sqlite3.OperationalError:  # a new file: no such table
            return False

    def close(self) -> None:
        """Close the connection."""
        self.db.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """One write transaction: all of it, or none of it."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self.db.in_transaction:  # SQLite itself has taken back what found the disk full
                self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    def rows(self, sql: str, *parameters: Any) -> list[Row]:
        """All rows of a query, as dicts."""
        return list(self.each(sql, *parameters))

    def each(self, sql: str, *parameters: Any) -> Iterator[Row]:
        """Yield the rows of a query one by one, as dicts, for results too long to hold."""
        cursor = self.db.execute(sql, parameters)
        names = [column[0] for column in cursor.description]
        for values in cursor:
            yield dict(zip(names, values, strict=True))

    def row(self, sql: str, *parameters: Any) -> Row | None:
        """The first row of a query, or None."""
        return next(self.each(sql, *parameters), None)

    def value(self, sql: str, *parameters: Any) -> Any:
        """The first column of the first row, or None."""
        row = self.db.execute(sql, parameters).fetchone()
        return row[0] if row else None

    def run(self, sql: str, *parameters: Any) -> int:
        """Execute one writing statement inside a transaction; the id of the row it inserted, if any."""
        if not self.db.in_transaction:
            raise RuntimeError("a write outside `with ledger.transaction()`")
        return self.db.execute(sql, parameters).lastrowid or 0

    def insert(self, table: str, **values: Any) -> int:
        """Insert one row inside a transaction; its id."""
        names = ", ".join(values)
        marks = ", ".join("?" for _ in values)
        return self.run(f"INSERT INTO {table} ({names}) VALUES ({marks})", *values.values())

    def counters(self) -> dict[str, int]:
        """Images by furthest stage reached, cumulative, kept by triggers."""
        return {row["name"]: row["n"] for row in self.rows("SELECT name, n FROM counter")}


def image_number(text: str) -> int:
    """The image number that a text is; -1, which no image has, where it is none that SQLite could hold."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else -1


def utc(now: datetime | None = None) -> str:
    """ISO 8601 in UTC, to the millisecond; the clock when no time is given."""
    return (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def when(text: str) -> datetime:
    """The aware datetime of an ISO 8601 text."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def canonical(value: Any) -> str:
    """JSON with sorted keys and no blanks: the same value always gives the same text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
