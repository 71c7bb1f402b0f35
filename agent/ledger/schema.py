"""The ledger's migrations in their order, and the tables that version 0.2 changes.

Only this file and `schema_0_1` hold table definitions. Append-only tables are protected by triggers; triggers also keep
the counters and the state of an image, so that `status` scans no table.
"""

import json
import sqlite3

from sqlite_utils import Database, Migrations

from agent.ledger import schema_0_1
from agent.ledger.schema_0_1 import append_only, only_forgotten
from agent.ledger.states import FORGOTTEN

migrations = Migrations("cxrloop")


@migrations()
def first(db: Database) -> None:
    """Create the tables of version 0.1."""
    run(db, schema_0_1.TABLES)
    for table in schema_0_1.APPEND_ONLY:
        for statement in append_only(table):
            db.execute(statement)


@migrations()
def retention_and_forget(db: Database) -> None:
    """Add what retention and `forget` need, and let rows of forgotten images leave the append-only tables."""
    run(db, schema_0_1.KEEPING + schema_0_1.FORGETTING)
    for table in ("prediction", "label", "golden_film"):
        for statement in only_forgotten(table, FORGOTTEN):
            db.execute(statement)


@migrations()
def pulled_studies(db: Database) -> None:
    """Add the studies that `cxrloop pull` has finished, so that a restart skips them."""
    db.execute(schema_0_1.PULLED)


@migrations()
def answers_to_the_pacs(db: Database) -> None:
    """Add the outbox of results, and the time at which an image was returned."""
    run(db, schema_0_1.OUTBOX)


@migrations()
def what_is_said_of_a_film(db: Database) -> None:
    """Add the indexes by which `forget` reads the rows of one image only."""
    run(db, schema_0_1.IMAGE_INDEXES)


@migrations()
def pulled_studies_by_mark(db: Database) -> None:
    """Key pulled studies by `privacy.study_mark`: a study UID of the archive could lead to the patient."""
    run(db, schema_0_1.PULLED_BY_MARK)


GOLDEN_IMAGE = """
DROP TRIGGER golden_film_no_update;
DROP TRIGGER golden_film_no_delete;
DROP TRIGGER golden_film_forgotten;
DROP INDEX golden_film_image;
ALTER TABLE golden_film RENAME TO golden_image;
CREATE INDEX golden_image_image ON golden_image(image);
ALTER TABLE golden_loss RENAME COLUMN films TO images;
ALTER TABLE pulled RENAME COLUMN films TO images;
"""

EVALUATION = """
ALTER TABLE round RENAME COLUMN look TO evaluate;
UPDATE round SET state = 'inconclusive' WHERE state = 'not_shown';
UPDATE round SET state = 'not_evaluated', reason = replace(replace(reason, 'no look is due', 'no evaluation is due'),
  '`--look` spends one', '`cxrloop evaluate ' || name || '` spends one') WHERE state = 'no_look';
-- One row an evaluation, written before any golden score is read: the row spends alpha. `rules`: the gate's rules as JSON,
-- empty for an evaluation of version 0.1, which did not record them.
CREATE TABLE evaluation (
  id INTEGER PRIMARY KEY, round TEXT NOT NULL, bundle TEXT NOT NULL, champion TEXT NOT NULL, baseline TEXT NOT NULL,
  golden INTEGER NOT NULL, rules TEXT NOT NULL, alpha REAL NOT NULL, at TEXT NOT NULL,
  UNIQUE (round, champion, baseline, golden, rules)
) STRICT;
INSERT INTO evaluation SELECT id, round, bundle,
  coalesce((SELECT d.bundle FROM deployment d WHERE d.state IN ('probation', 'live') AND d.at <= look.at
            ORDER BY d.id DESC LIMIT 1), ''),
  coalesce((SELECT b.id FROM bundle b WHERE b.is_baseline = 1), ''), golden, '', alpha, at FROM look;
CREATE TABLE verdict_0_2 (
  evaluation INTEGER PRIMARY KEY REFERENCES evaluation(id), outcome TEXT NOT NULL, json TEXT NOT NULL, at TEXT NOT NULL
) STRICT;
"""

# What version 0.1 wrote into a verdict, and what version 0.2 writes.
OUTCOMES = {"not_shown": "inconclusive"}
LINE = (("not shown: ", "inconclusive: "), ("; NOT SHOWN, not required: ", "; INCONCLUSIVE, not required: "))


@migrations()
def names_of_0_2(db: Database) -> None:
    """Rename films to images, looks to evaluations, and the states `not_shown` and `no_look`; allow a second evaluation."""
    run(db, GOLDEN_IMAGE)
    for statement in (*append_only("golden_image"), *only_forgotten("golden_image", FORGOTTEN)):
        db.execute(statement)
    run(db, EVALUATION)
    for look, outcome, text, at in db.execute("SELECT look, outcome, json, at FROM verdict").fetchall():
        row = (look, OUTCOMES.get(outcome, outcome), verdict_of_0_2(text), at)
        db.execute("INSERT INTO verdict_0_2 VALUES (?, ?, ?, ?)", row)
    run(db, "DROP TABLE verdict;\nDROP TABLE look;\nALTER TABLE verdict_0_2 RENAME TO verdict;")
    for table in ("evaluation", "verdict"):
        for statement in append_only(table):
            db.execute(statement)


# The pool of unlabelled images is drawn from these rows, one for each usable image of the train range.
POOL = """
-- `draw`: keyed random number in (0, 1) that never changes. `code`: finds near-duplicates; NULL where the plate could not be
-- read. `copy_of`: the earlier image that this one nearly equals; only the earlier one is drawn.
CREATE TABLE pool_image (
  image INTEGER PRIMARY KEY REFERENCES image(id), draw REAL NOT NULL, code BLOB, copy_of INTEGER
) STRICT;
CREATE INDEX pool_image_copies ON pool_image(copy_of) WHERE copy_of IS NOT NULL;
-- Pieces of the codes of images that are no copies: near-duplicates share at least one.
CREATE TABLE pool_band (
  band INTEGER NOT NULL, image INTEGER NOT NULL REFERENCES image(id), PRIMARY KEY (band, image)
) STRICT, WITHOUT ROWID;
CREATE INDEX pool_band_image ON pool_band(image);
-- Images that wait for their row in pool_image; filled by triggers.
CREATE TABLE pool_waiting (image INTEGER PRIMARY KEY REFERENCES image(id)) STRICT;
INSERT INTO pool_waiting SELECT id FROM image
  WHERE range = 'train' AND plate IS NOT NULL AND heartbeat = 0 AND superseded_by IS NULL;
CREATE TRIGGER pool_image_waits AFTER INSERT ON image
  WHEN NEW.range = 'train' AND NEW.plate IS NOT NULL AND NEW.heartbeat = 0 BEGIN
  INSERT INTO pool_waiting VALUES (NEW.id);
END;
CREATE TRIGGER pool_image_superseded AFTER UPDATE OF superseded_by ON image WHEN NEW.superseded_by IS NOT NULL BEGIN
  DELETE FROM pool_waiting WHERE image = NEW.id;
  DELETE FROM pool_image WHERE image = NEW.id;
END;
-- An image leaves (forgotten, superseded): its copies wait again, and the first of them takes its place.
CREATE TRIGGER pool_image_left AFTER DELETE ON pool_image WHEN OLD.copy_of IS NULL BEGIN
  DELETE FROM pool_band WHERE image = OLD.image;
  INSERT OR IGNORE INTO pool_waiting SELECT image FROM pool_image WHERE copy_of = OLD.image;
  DELETE FROM pool_image WHERE copy_of = OLD.image;
END;
"""


@migrations()
def pool_of_unlabelled_images(db: Database) -> None:
    """Add the tables from which the pool of unlabelled images is drawn; all images wait for their row."""
    run(db, POOL)


@migrations()
def tidied_rounds(db: Database) -> None:
    """Add how far a round that has ended is tidied: 0 not yet, 1 its working files are gone, 2 its training state too."""
    db.execute("ALTER TABLE round ADD COLUMN tidied INTEGER NOT NULL DEFAULT 0")


def verdict_of_0_2(text: str) -> str:
    """Return a verdict's JSON of version 0.1 with the outcome names of version 0.2."""
    verdict = json.loads(text)
    verdict["outcome"] = OUTCOMES.get(verdict["outcome"], verdict["outcome"])
    for check in verdict["checks"]:
        check["outcome"] = OUTCOMES.get(check["outcome"], check["outcome"])
    old, new = LINE[0]
    if verdict["line"].startswith(old):
        verdict["line"] = new + verdict["line"].removeprefix(old)
    verdict["line"] = verdict["line"].replace(*LINE[1])
    return json.dumps(verdict, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def run(db: Database, text: str) -> None:
    """Execute the statements of a text one by one (executescript would commit the migration's own transaction)."""
    statement = ""
    for line in text.splitlines():
        if not line.strip().startswith("--"):
            statement += line + "\n"
        if statement.strip() and sqlite3.complete_statement(statement):  # a trigger holds several semicolons
            db.execute(statement)
            statement = ""
