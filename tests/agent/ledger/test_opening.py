"""Opening the ledger: a current file needs no migration engine, an older one gets it, append-only tables stay so."""

import sqlite3
import subprocess
import sys

import pytest
from sqlite_utils import Database

from agent.ledger import database, schema
from agent.ledger.database import Ledger

LOADED = "import sys; from pathlib import Path; from agent.ledger.database import Ledger; Ledger(Path(sys.argv[1])).close(); print('sqlite_utils' in sys.modules)"


def opens_with_engine(path) -> bool:
    done = subprocess.run([sys.executable, "-c", LOADED, str(path)], capture_output=True, text=True, check=True)
    return done.stdout.strip() == "True"


def test_the_newest_migration_is_the_one_that_a_current_ledger_is_known_by(tmp_path):
    with Ledger(tmp_path / "ledger.db") as ledger:
        applied = [migration.name for migration in schema.migrations.applied(Database(ledger.db))]
        assert not schema.migrations.pending(Database(ledger.db))
    assert applied[-1] == database.LATEST


def test_only_a_new_or_an_older_ledger_loads_the_migration_engine(tmp_path):
    path, older = tmp_path / "ledger.db", tmp_path / "older.db"
    assert opens_with_engine(path)
    assert not opens_with_engine(path)
    connection = sqlite3.connect(older, isolation_level=None)
    schema.migrations.apply(Database(connection), stop_before=database.LATEST)
    connection.close()
    assert opens_with_engine(older)
    assert not opens_with_engine(older)
    with Ledger(older) as ledger:
        assert not schema.migrations.pending(Database(ledger.db))


def test_replacing_a_row_is_no_way_around_an_append_only_table(tmp_path):
    with Ledger(tmp_path / "ledger.db") as ledger, ledger.transaction():
        entry = ledger.insert("audit", at="", who="", what="made", why="", before="", after="", previous="", hash="")
        with pytest.raises(sqlite3.IntegrityError, match="audit is append-only"):
            ledger.run("INSERT OR REPLACE INTO audit VALUES (?, '', '', 'changed', '', '', '', '', '')", entry)
        assert ledger.value("SELECT what FROM audit") == "made"
