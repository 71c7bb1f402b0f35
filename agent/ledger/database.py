"""The ledger, one SQLite file: open and migrate it, read rows, write in transactions.

Reads need no transaction. Every write happens in `transaction()`, which takes the write lock at once
(BEGIN IMMEDIATE), so that a read followed by a write never fails with "database is locked".
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
LATEST = "tidied_rounds"  # the newest migration of agent.ledger.schema: a ledger that has it needs none
BUSY_MS = 30_000  # longer than any transaction of ours; a person waits no longer for a command


class Ledger:
    """A connection to the ledger, one per thread. Opening it creates or migrates the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.db.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
        with (path.parent / (path.name + ".lock")).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two processes that start together must not both create the tables
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
        """Commit what the block writes, or nothing of it when the block raises."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        finally:
            if self.db.in_transaction:  # neither committed nor, on a full disk, rolled back by SQLite itself
                self.db.execute("ROLLBACK")

    def rows(self, sql: str, *parameters: Any) -> list[Row]:
        """Return all rows of a query, as dicts."""
        return list(self.each(sql, *parameters))

    def each(self, sql: str, *parameters: Any) -> Iterator[Row]:
        """Yield the rows of a query one by one, as dicts, for results too long to hold."""
        cursor = self.db.execute(sql, parameters)
        names = [column[0] for column in cursor.description]
        for values in cursor:
            yield dict(zip(names, values, strict=True))

    def row(self, sql: str, *parameters: Any) -> Row | None:
        """Return the first row of a query, or None."""
        return next(self.each(sql, *parameters), None)

    def value(self, sql: str, *parameters: Any) -> Any:
        """Return the first column of the first row, or None."""
        row = self.db.execute(sql, parameters).fetchone()
        return row[0] if row else None

    def run(self, sql: str, *parameters: Any) -> int:
        """Execute one writing statement inside a transaction; return the id of the row that it inserted, else 0."""
        if not self.db.in_transaction:
            raise RuntimeError("a write outside `with ledger.transaction()`")
        return self.db.execute(sql, parameters).lastrowid or 0

    def insert(self, table: str, **values: Any) -> int:
        """Insert one row inside a transaction; return its id."""
        names = ", ".join(values)
        marks = ", ".join("?" for _ in values)
        return self.run(f"INSERT INTO {table} ({names}) VALUES ({marks})", *values.values())

    def counters(self) -> dict[str, int]:
        """Return the number of images that reached each stage; triggers keep these counts."""
        return {row["name"]: row["n"] for row in self.rows("SELECT name, n FROM counter")}


def image_number(text: str) -> int:
    """Return the image number in a text; -1, which no image has, where SQLite could hold no such number."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else -1


def utc(now: datetime | None = None) -> str:
    """Return a time (now by default) as ISO 8601 text in UTC, to the millisecond."""
    return (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def when(text: str) -> datetime:
    """Return the aware datetime of an ISO 8601 text."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def canonical(value: Any) -> str:
    """Return JSON with sorted keys and no blanks: equal values give equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
