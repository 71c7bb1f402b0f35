"""The tables of version 0.1, frozen: the SQL of its migrations must never change, since ledgers of 0.1 were made by it.

Later versions change these tables by migrations in `schema`. A film is an image in today's words.
"""

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

KEEPING = """
-- When the film's file was dropped (retention, forget); set before the unlink: what a reader sees is always safe.
ALTER TABLE image ADD COLUMN dropped_at TEXT;
-- Files that may be dropped, and since when their time runs: originals since their score, others since they came.
-- `dropping` is the intent row of an unlink; the row is gone when the file is.
CREATE TABLE kept_file (
  image INTEGER PRIMARY KEY REFERENCES image(id), kind TEXT NOT NULL CHECK (kind IN ('original','aside','dropping')),
  since TEXT NOT NULL
) STRICT;
CREATE INDEX kept_file_since ON kept_file(kind, since);
INSERT INTO kept_file SELECT id, 'aside', stored_at FROM image WHERE plate IS NULL;
INSERT INTO kept_file SELECT image, 'original', min(at) FROM prediction GROUP BY image;
CREATE TRIGGER aside_kept AFTER INSERT ON image WHEN NEW.plate IS NULL BEGIN
  INSERT INTO kept_file VALUES (NEW.id, 'aside', NEW.stored_at);
END;
CREATE TRIGGER original_kept AFTER INSERT ON prediction BEGIN
  INSERT OR IGNORE INTO kept_file SELECT id, 'original', NEW.at FROM image WHERE id = NEW.image AND dropped_at IS NULL;
END;
INSERT INTO counter VALUES ('dropped', 0);
"""

FORGETTING = """
-- One row a `forget`; the pseudonyms (JSON) go with the films. files: something may still be on disk, bytes: only in
-- the database's own free space, done: nowhere.
CREATE TABLE forget (
  id INTEGER PRIMARY KEY, state TEXT NOT NULL CHECK (state IN ('files','bytes','done')), patient_keys TEXT NOT NULL,
  sop_uids TEXT NOT NULL, by TEXT NOT NULL, reason TEXT NOT NULL, at TEXT NOT NULL, done_at TEXT
) STRICT;
-- The films of an open `forget` and where their files are; only their rows may leave the append-only tables.
CREATE TABLE forgetting (image INTEGER PRIMARY KEY, forget INTEGER NOT NULL REFERENCES forget(id), original TEXT NOT NULL, plate TEXT) STRICT;
-- Keyed hashes of patients whose later films are refused.
CREATE TABLE refused_patient (hash TEXT PRIMARY KEY, at TEXT NOT NULL) STRICT;
-- A frozen golden set that lost films says so.
CREATE TABLE golden_loss (version INTEGER NOT NULL, films INTEGER NOT NULL, at TEXT NOT NULL) STRICT;
"""

PULLED = (
    "CREATE TABLE pulled (source TEXT NOT NULL, study_uid TEXT NOT NULL, modalities TEXT NOT NULL, "
    "instances INTEGER NOT NULL, films INTEGER NOT NULL, at TEXT NOT NULL, "
    "PRIMARY KEY (source, study_uid, modalities)) STRICT"
)

OUTBOX = """
-- What is to be sent to the PACS, one row a result, written with the score. A row stays; its heatmap until Success.
CREATE TABLE outbox (
  id INTEGER PRIMARY KEY, image INTEGER NOT NULL REFERENCES image(id), bundle TEXT NOT NULL,
  kind TEXT NOT NULL CHECK (kind IN ('sr','sc')), heatmap BLOB,
  state TEXT NOT NULL CHECK (state IN ('waiting','sent','failed','withdrawn')), attempts INTEGER NOT NULL DEFAULT 0,
  due TEXT NOT NULL, why TEXT, at TEXT NOT NULL, sent_at TEXT, UNIQUE (image, bundle, kind)
) STRICT;
CREATE INDEX outbox_due ON outbox(due, id) WHERE state = 'waiting';
CREATE INDEX outbox_state ON outbox(state, at);
-- Films that a person wants scored once more; new films go first.
CREATE TABLE score_again (image INTEGER PRIMARY KEY REFERENCES image(id)) STRICT;
ALTER TABLE image ADD COLUMN returned_at TEXT;
INSERT INTO counter VALUES ('outbox waiting',0), ('outbox sent',0), ('outbox failed',0), ('outbox withdrawn',0);
CREATE TRIGGER outbox_in AFTER INSERT ON outbox BEGIN
  UPDATE counter SET n = n + 1 WHERE name = 'outbox ' || NEW.state;
END;
CREATE TRIGGER outbox_out AFTER DELETE ON outbox BEGIN
  UPDATE counter SET n = n - 1 WHERE name = 'outbox ' || OLD.state;
END;
CREATE TRIGGER outbox_moved AFTER UPDATE OF state ON outbox WHEN OLD.state != NEW.state BEGIN
  UPDATE counter SET n = n + 1 WHERE name = 'outbox ' || NEW.state;
  UPDATE counter SET n = n - 1 WHERE name = 'outbox ' || OLD.state;
  -- Returned: every result of the film had its Success.
  UPDATE image SET returned_at = NEW.sent_at, state = CASE state WHEN 'predicted' THEN 'returned' ELSE state END
    WHERE NEW.state = 'sent' AND id = NEW.image AND returned_at IS NULL
    AND NOT EXISTS (SELECT 1 FROM outbox WHERE image = NEW.image AND state IN ('waiting','failed'));
END;
CREATE TRIGGER image_returned AFTER UPDATE OF returned_at ON image WHEN OLD.returned_at IS NULL AND NEW.returned_at IS NOT NULL BEGIN
  UPDATE counter SET n = n + 1 WHERE name = 'returned';
END;
-- A result under a corrected header's old name must not reach the PACS any more; a forgotten film has no results.
CREATE TRIGGER outbox_withdrawn AFTER UPDATE OF superseded_by ON image WHEN NEW.superseded_by IS NOT NULL BEGIN
  UPDATE outbox SET state = 'withdrawn', heatmap = NULL WHERE image = NEW.id AND state IN ('waiting','failed');
END;
CREATE TRIGGER outbox_forgotten AFTER UPDATE OF reason ON image WHEN NEW.reason = 'forgotten' BEGIN
  DELETE FROM outbox WHERE image = NEW.id;
  DELETE FROM score_again WHERE image = NEW.id;
END;
"""

IMAGE_INDEXES = """
CREATE INDEX receipt_image ON receipt(image);
CREATE INDEX golden_film_image ON golden_film(image);
CREATE INDEX pulled_study ON pulled(study_uid);
"""

PULLED_BY_MARK = """
DROP TABLE pulled;
CREATE TABLE pulled (source TEXT NOT NULL, study TEXT NOT NULL, modalities TEXT NOT NULL, instances INTEGER NOT NULL, films INTEGER NOT NULL, at TEXT NOT NULL, PRIMARY KEY (source, study, modalities)) STRICT;
CREATE INDEX pulled_study ON pulled(study);
"""


def append_only(table: str) -> list[str]:
    """Return the triggers that let nobody change or delete a row of this table."""
    return [
        f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        for verb in ("UPDATE", "DELETE")
    ]


def only_forgotten(table: str, forgotten: str) -> list[str]:
    """Return the triggers that let rows of forgotten images go, and keep new ones of theirs out.

    A score or a label may be on its way while its image is forgotten.
    """
    return [
        f"DROP TRIGGER {table}_no_delete",
        f"CREATE TRIGGER {table}_no_delete BEFORE DELETE ON {table} "
        f"WHEN OLD.image NOT IN (SELECT image FROM forgetting) "
        f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END",
        f"CREATE TRIGGER {table}_forgotten BEFORE INSERT ON {table} "
        f"WHEN (SELECT reason FROM image WHERE id = NEW.image) = '{forgotten}' BEGIN SELECT RAISE(IGNORE); END",
    ]
