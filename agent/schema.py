"""The only DDL: tables, triggers and indexes of the ledger.

Append-only tables are held by triggers. Counters and the state of an image are kept by triggers too,
so that no status ever scans. Knows nothing of who writes.
"""

import sqlite3

from sqlite_utils import Database, Migrations

migrations = Migrations("cxrloop")

APPEND_ONLY = (
    "prediction",
    "label",
    "deployment",
    "golden_film",
    "golden_set",
    "look",
    "verdict",
    "approval",
    "audit",
)

TABLES = """
CREATE TABLE site (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;

-- One row a film, whatever became of it. Aside films (rejected, quarantined) keep their reason.
CREATE TABLE image (
  id INTEGER PRIMARY KEY, sha256 TEXT NOT NULL UNIQUE, state TEXT NOT NULL, reason TEXT,
  sop_uid TEXT, study_uid TEXT, patient_key TEXT, range TEXT, view TEXT,
  acquired_at TEXT, received_at TEXT NOT NULL, stored_at TEXT NOT NULL,
  sex TEXT, age_years REAL, scanner TEXT, transfer_syntax TEXT,
  pixel_sha256 TEXT, plate TEXT, plate_version INTEGER, original TEXT NOT NULL,
  file TEXT, heartbeat INTEGER NOT NULL DEFAULT 0,
  superseded_by INTEGER REFERENCES image(id),
  CHECK (state IN ('stored','predicted','returned','labelled','rejected','quarantined'))
) STRICT;
CREATE INDEX image_sop ON image(sop_uid);
CREATE INDEX image_file ON image(file) WHERE file IS NOT NULL;
CREATE INDEX image_state ON image(state, id);
CREATE INDEX image_patient ON image(patient_key);
CREATE INDEX image_pool ON image(range, id) WHERE plate IS NOT NULL AND heartbeat = 0 AND superseded_by IS NULL;

-- What became of each inbox file: makes taking it in twice harmless.
CREATE TABLE receipt (name TEXT PRIMARY KEY, image INTEGER REFERENCES image(id), outcome TEXT NOT NULL, at TEXT NOT NULL) STRICT;

-- Films that wait for a score; filled and emptied by triggers.
CREATE TABLE unscored (image INTEGER PRIMARY KEY) STRICT;

CREATE TABLE prediction (
  id INTEGER PRIMARY KEY, image INTEGER NOT NULL REFERENCES image(id), bundle TEXT NOT NULL,
  probabilities TEXT NOT NULL, at TEXT NOT NULL, UNIQUE (image, bundle)
) STRICT;

CREATE TABLE label (
  id INTEGER PRIMARY KEY, image INTEGER NOT NULL REFERENCES image(id), finding TEXT NOT NULL,
  value INTEGER CHECK (value IN (0, 1)), source TEXT NOT NULL CHECK (source IN ('report','radiologist','adjudicated')),
  by TEXT NOT NULL, at TEXT NOT NULL
) STRICT;
CREATE INDEX label_image ON label(image, finding);
-- The label that counts: adjudicated > radiologist > report, then the newest.
CREATE VIEW label_now AS
  SELECT image, finding, value, source FROM (
    SELECT *, row_number() OVER (PARTITION BY image, finding ORDER BY
      CASE source WHEN 'adjudicated' THEN 2 WHEN 'radiologist' THEN 1 ELSE 0 END DESC, id DESC) AS place FROM label)
  WHERE place = 1;

CREATE TABLE golden_set (version INTEGER PRIMARY KEY, sha256 TEXT NOT NULL, by TEXT NOT NULL, at TEXT NOT NULL) STRICT;
-- The labels are frozen with the films: a later correction makes a new version, never a moved bar.
CREATE TABLE golden_film (
  version INTEGER NOT NULL, image INTEGER NOT NULL REFERENCES image(id), finding TEXT NOT NULL, value INTEGER,
  PRIMARY KEY (version, image, finding)
) STRICT;

CREATE TABLE round (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, state TEXT NOT NULL, reason TEXT, why TEXT NOT NULL,
  recipe TEXT NOT NULL, parent TEXT, bundle TEXT, unlabelled INTEGER, labelled INTEGER, seconds REAL NOT NULL DEFAULT 0,
  look INTEGER NOT NULL DEFAULT 0, until TEXT, crashes INTEGER NOT NULL DEFAULT 0, last_image INTEGER NOT NULL DEFAULT 0,
  planned_at TEXT NOT NULL, ended_at TEXT
) STRICT;

CREATE TABLE bundle (
  id TEXT PRIMARY KEY, round TEXT, state TEXT NOT NULL, is_baseline INTEGER NOT NULL DEFAULT 0,
  training_state TEXT, created_at TEXT NOT NULL, approved_by TEXT
) STRICT;

CREATE UNIQUE INDEX one_in_service ON bundle((1)) WHERE state IN ('probation', 'live');

CREATE TABLE deployment (
  id INTEGER PRIMARY KEY, bundle TEXT NOT NULL REFERENCES bundle(id), state TEXT NOT NULL, previous TEXT,
  by TEXT NOT NULL, reason TEXT NOT NULL, at TEXT NOT NULL
) STRICT;
CREATE TABLE approval (id INTEGER PRIMARY KEY, bundle TEXT NOT NULL REFERENCES bundle(id), by TEXT NOT NULL, reason TEXT NOT NULL, at TEXT NOT NULL) STRICT;

-- A look spends alpha when its row is written, before any golden score is read.
CREATE TABLE look (
  id INTEGER PRIMARY KEY, round TEXT NOT NULL UNIQUE, bundle TEXT NOT NULL, golden INTEGER NOT NULL, alpha REAL NOT NULL, at TEXT NOT NULL
) STRICT;
CREATE TABLE verdict (look INTEGER PRIMARY KEY REFERENCES look(id), outcome TEXT NOT NULL, json TEXT NOT NULL, at TEXT NOT NULL) STRICT;

CREATE TABLE notice (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, detail TEXT NOT NULL, at TEXT NOT NULL) STRICT;

CREATE TABLE audit (
  seq INTEGER PRIMARY KEY, at TEXT NOT NULL, who TEXT NOT NULL, what TEXT NOT NULL, why TEXT NOT NULL,
  before TEXT NOT NULL, after TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL
) STRICT;

CREATE TABLE counter (name TEXT PRIMARY KEY, n INTEGER NOT NULL) STRICT;
INSERT INTO counter VALUES ('stored',0), ('predicted',0), ('returned',0), ('labelled',0), ('rejected',0), ('quarantined',0);

CREATE TRIGGER image_counted AFTER INSERT ON image BEGIN
  UPDATE counter SET n = n + 1 WHERE name = NEW.state;
  INSERT INTO unscored SELECT NEW.id WHERE NEW.state = 'stored';
END;
CREATE TRIGGER image_predicted AFTER INSERT ON prediction
  WHEN (SELECT count(*) FROM prediction WHERE image = NEW.image) = 1 BEGIN
  UPDATE counter SET n = n + 1 WHERE name = 'predicted';
  DELETE FROM unscored WHERE image = NEW.image;
  UPDATE image SET state = 'predicted' WHERE id = NEW.image AND state = 'stored';
END;
CREATE TRIGGER image_labelled AFTER INSERT ON label
  WHEN (SELECT count(*) FROM label WHERE image = NEW.image) = 1 BEGIN
  UPDATE counter SET n = n + 1 WHERE name = 'labelled';
  UPDATE image SET state = 'labelled' WHERE id = NEW.image;
END;
"""


@migrations()
def first(db: Database) -> None:
    """Version 0.1: everything."""
    # Not executescript: it would commit the migration's own transaction.
    statement = ""
    for line in TABLES.splitlines():
        if not line.strip().startswith("--"):
            statement += line + "\n"
        if complete(statement):
            db.execute(statement)
            statement = ""
    for table in APPEND_ONLY:
        for verb in ("UPDATE", "DELETE"):
            db.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )


def complete(statement: str) -> bool:
    """True when `statement` is one whole SQL statement (a trigger holds several semicolons)."""

    return bool(statement.strip()) and sqlite3.complete_statement(statement)
