"""`forget`: after it no byte in the site folder leads to the patient, whatever the films had become by then."""

import json
import shutil
import sqlite3
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agent import audit, forget, forget_rounds, golden, intake, labels, predict, rounds, training
from agent.cli import app
from agent.clockwork import housekeeping
from agent.errors import Problem
from agent.ledger import Ledger, utc
from agent.site import Site
from agent.status import status
from dicom.commitment import Pending, Request
from dicom.privacy import patient_key
from learner.round_dir import held, write_json
from tests.conftest import make_site
from tests.crash_line import DIED, count_steps, in_child, write_labels
from tests.deploy_site import FINDINGS
from tests.films import Here, film, put, save, take_in
from tests.models import Served, add_model

PATIENT, NAME, FILE = "HN-0815-4711", "GRUBER^LEOPOLDINE", "gruber_leopoldine.png"
NOW = datetime.now(UTC)
WHO = ("Dr Osei", "the patient asked for it")


def theirs(seed: int, **facts: object):
    """A film of the patient who will be forgotten."""
    ds = film(seed, patient=PATIENT, **facts)
    ds.PatientName = NAME
    ds.AccessionNumber = f"ACC-GRUBER-{seed}"
    return ds


def the_key(site: Site) -> str:
    return patient_key(site.key("pseudonym.key"), PATIENT, "", "")[0]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def found(site: Site, words: list[bytes]) -> list[tuple[str, bytes]]:
    """Every place in the site folder, names of files included, that holds one of these."""
    files = everything(site.root).items()
    return [(name, word[:60]) for name, data in files for word in words if word in data or word in name.encode()]


def score_all(site: Site, ledger: Ledger) -> None:
    while predict.step(site, ledger, Served(site, ledger)):  # type: ignore[arg-type]
        pass


def a_site(folder: Path) -> Site:
    return make_site(
        folder,
        site={"findings": list(FINDINGS)},
        results={"sr": True, "sc": True, "destination": "PACS@127.0.0.1:1"},
        patients={"golden": 0.0, "golden_next": 0.0, "calibration": 0.0, "validation": 0.0},
    )


@pytest.fixture
def site(tmp_path):
    return a_site(tmp_path / "site")


@pytest.fixture
def lived_in(whole_life, tmp_path):
    """A copy of a site where the patient's films are in every place that a film can be in; what must not be found after."""
    base, bits = whole_life
    shutil.copytree(base.root, tmp_path / "site")
    return Site.open(tmp_path / "site" / "appliance.toml"), bits


@pytest.fixture(scope="module")
def whole_life(tmp_path_factory):
    """The site that `lived_in` copies, made once; (site, bits)."""
    site = a_site(tmp_path_factory.mktemp("life") / "site")
    with site.ledger() as ledger:
        add_model(site, ledger, 1)
        corrected = theirs(3)
        lateral = theirs(4, view="LL")
        sent = [theirs(1), theirs(2), theirs(3), lateral, *(film(seed) for seed in range(20, 26))]
        for number, ds in enumerate(sent):
            put(site, ds, f"{number}.dcm")
        take_in(site, ledger)
        corrected.StudyInstanceUID = "1.2.826.777.888"  # a new version of the third
        put(site, corrected)
        broken = save(theirs(5), site.root / "run" / "broken.dcm").read_bytes()
        site.inbox.put(b"\0" * 128 + b"DICX" + broken[132:3000])  # unreadable, and names the patient all the same
        take_in(site, ledger)
        with ledger.transaction():
            ledger.run("UPDATE image SET file = ? WHERE sop_uid = ?", FILE, theirs(1).SOPInstanceUID)
        (site.root / "run" / "broken.dcm").unlink()
        score_all(site, ledger)
        uids = [str(theirs(seed).SOPInstanceUID) for seed in (1, 2)] + [str(film(20).SOPInstanceUID)]
        write_labels(site.root / "run" / "labels.csv", [(uid, FINDINGS[0], n % 2) for n, uid in enumerate(uids)])
        labels.import_csv(site, ledger, site.root / "run" / "labels.csv", "Dr Osei")
        (site.root / "run" / "labels.csv").unlink()
        with ledger.transaction():
            for ds in (theirs(1), film(20)):
                ledger.insert(
                    "pulled",
                    source="PACS",
                    study_uid=str(ds.StudyInstanceUID),
                    modalities="CR",
                    instances=1,
                    films=1,
                    at="",
                )
        row = rounds.plan(site, ledger, "now", NOW)
        mine = ledger.rows("SELECT * FROM image WHERE patient_key = ?", the_key(site))
    assert {row["state"] for row in mine} == {"labelled", "predicted", "rejected"}
    caches(site, row["name"], [row["plate"] for row in mine if row["plate"]])
    put(site, theirs(6))  # waits in the inbox
    save(theirs(7), site.root / "drop" / "late.dcm")
    orphan = save(theirs(8), site.root / "run" / "orphan.dcm")  # kept by an intake that died before its row
    examined = next(iter(Here(site).examine([orphan])))[1]
    site.store.keep_original(orphan, examined.sha256)
    site.store.keep_plate(examined.plate, examined.sha256)
    orphan.unlink()
    references = ((str(theirs(1).SOPClassUID), str(theirs(1).SOPInstanceUID)),)
    Pending(site.root / "node" / "commitment").keep(Request("PACS", "1.2.3.4", references, 0.0))
    words = [PATIENT, NAME, "ACC-GRUBER", "GRUBER", FILE, the_key(site), *(row["sha256"] for row in mine)]
    words += [row["pixel_sha256"] for row in mine if row["pixel_sha256"]]
    for ds in (*(theirs(seed) for seed in range(1, 9)), corrected):
        words += [str(ds.SOPInstanceUID), str(ds.StudyInstanceUID), str(ds.SeriesInstanceUID)]
    bits = [theirs(seed).PixelData[5000:5064] for seed in range(1, 9)]
    bits += [site.store.plate(row["plate"]).tobytes()[131072:131136] for row in mine if row["plate"]]
    bits += [word.encode() for word in words]
    assert len(found(site, bits)) > 50
    return site, bits


def caches(site: Site, name: str, plates: list[str]) -> None:
    """What a round makes of its films on the way, as the learner lays it out."""
    folder = site.rounds / name
    for part in ("shard", "checkpoint", ".tokens.tmp"):
        (folder / part).mkdir()
        packed = b"".join(site.store.plate(plate).tobytes() for plate in plates)
        (folder / part / "levels.bin").write_bytes(packed)
    (folder / "learner.log").write_text(f"{plates[0]}: not a plate\n")


def test_no_byte_of_the_patient_is_left_and_the_others_lose_nothing(lived_in):
    site, bits = lived_in
    with site.ledger() as ledger:
        others = ledger.rows("SELECT * FROM image WHERE patient_key != ? ORDER BY id", the_key(site))
        scores = ledger.value("SELECT count(*) FROM prediction")
        said = forget.forget(site, ledger, forget.keys_of(site, PATIENT, ()), *WHO, refuse=False)
        assert said["state"] == "done"
        assert found(site, bits) == []
        assert ledger.rows("SELECT * FROM image WHERE patient_key IS NOT NULL ORDER BY id") == others
        assert all(site.store.path(row["original"]).exists() for row in others)
        assert ledger.value("SELECT count(*) FROM prediction") == scores - said["predictions"] == len(others)
        assert ledger.value("SELECT study_uid FROM pulled") == str(film(20).StudyInstanceUID)
        gone = [row["id"] for row in ledger.rows("SELECT id FROM image WHERE reason = 'forgotten'")]
        assert len(gone) == said["films"] == 6  # one corrected, one lateral, one unreadable among them
        for table in forget.of_a_film(ledger):
            left = {row["image"] for row in ledger.rows(f"SELECT image FROM {table}")}
            assert not left & set(gone), table
        assert audit.verify(ledger, site.root / "audit.heads", site.key("signing.pub"))["ok"]


def test_the_database_s_free_space_holds_nothing_either(site):
    """Many rows, so that pages become free, and an SQLite that doesn't wipe what it deletes."""
    key = the_key(site)
    with site.ledger() as ledger:
        ledger.db.execute("PRAGMA secure_delete = OFF")
        with ledger.transaction():
            for n in range(300):
                ledger.insert(
                    "image", sha256=f"{n:064x}", state="stored", sop_uid=f"1.2.77777.{n}", study_uid="1.2.88888.1", patient_key=key,
                    file=FILE, received_at="", stored_at="", original=f"originals/00/{n:064x}.dcm", plate=f"plates/00/{n:064x}.npy",
                )  # fmt: skip
        assert forget.forget(site, ledger, [key], *WHO, refuse=False)["state"] == "done"
    assert found(site, [b"1.2.77777", b"1.2.88888", FILE.encode(), key.encode(), b"originals/00"]) == []


def test_what_went_is_said_before_and_after_in_the_same_numbers(lived_in):
    site, _ = lived_in
    with site.ledger() as ledger:
        keys = forget.keys_of(site, PATIENT, ())
        before = everything(site.root)
        would = forget.preview(site, ledger, keys)
        assert {name: data for name, data in everything(site.root).items() if "ledger.db" not in name} == {
            name: data for name, data in before.items() if "ledger.db" not in name
        }
        said = forget.forget(site, ledger, keys, *WHO, refuse=False)
        assert {name: said[name] for name in would} == would
        assert (would["films"], would["originals"], would["aside"], would["waiting"]) == (6, 4, 2, 2)
        assert (would["predictions"], would["labels"], would["rounds"]) == (4, 2, ["r0001"])
        with pytest.raises(Problem, match="nothing of this patient is here"):
            forget.forget(site, ledger, keys, *WHO, refuse=False)


def test_audit_and_notices_hold_numbers_and_no_patient(lived_in):
    site, bits = lived_in
    with site.ledger() as ledger:
        forget.forget(site, ledger, [the_key(site)], *WHO, refuse=False)
        entries = ledger.rows("SELECT * FROM audit ORDER BY seq DESC LIMIT 3")
        text = json.dumps(entries) + json.dumps(ledger.rows("SELECT * FROM notice"))
    assert [entry["what"] for entry in entries] == ["patient forgotten", "round cancelled", "patient to be forgotten"]
    assert not any(bit in text.encode() for bit in bits)


def test_a_corrected_film_takes_the_version_with_the_wrong_patient_with_it(site):
    wrong, right = film(1, patient="SOMEBODY-ELSE"), theirs(1)
    right.SOPInstanceUID = right.file_meta.MediaStorageSOPInstanceUID = wrong.SOPInstanceUID
    with site.ledger() as ledger:
        for ds in (wrong, right):
            put(site, ds)
            take_in(site, ledger)
        assert forget.forget(site, ledger, [the_key(site)], *WHO, refuse=False)["films"] == 2
        assert ledger.value("SELECT count(*) FROM image WHERE reason = 'forgotten'") == 2


def test_an_id_with_an_issuer_is_another_patient_until_the_issuer_is_named(site):
    ds = theirs(1)
    ds.IssuerOfPatientID = "WEST"
    put(site, ds)
    with site.ledger() as ledger:
        take_in(site, ledger)
        with pytest.raises(Problem, match="--issuer"):
            forget.forget(site, ledger, forget.keys_of(site, PATIENT, ()), *WHO, refuse=False)
        assert forget.forget(site, ledger, forget.keys_of(site, PATIENT, ["WEST"]), *WHO, refuse=False)["films"] == 1


def test_an_id_that_stands_for_nobody_is_refused(site):
    with pytest.raises(Problem, match="stands for no patient"):
        forget.keys_of(site, " unknown ", ())
    with pytest.raises(Problem, match="16 hex"):
        forget.checked_key("HN-0815")


def test_a_later_film_comes_in_again_unless_it_is_to_be_refused(site):
    for refuse, stored in ((False, 1), (True, 0)):
        with site.ledger() as ledger:
            put(site, theirs(1))
            take_in(site, ledger)
            forget.forget(site, ledger, [the_key(site)], *WHO, refuse=refuse)
            put(site, theirs(2))
            take_in(site, ledger)
            assert ledger.value("SELECT count(*) FROM image WHERE patient_key IS NOT NULL") == stored
            assert site.inbox.waiting() == []
    assert found(site, [PATIENT.encode(), the_key(site).encode(), str(theirs(2).SOPInstanceUID).encode()]) == []
    with site.ledger() as ledger:
        assert ledger.value("SELECT outcome FROM receipt WHERE image IS NULL") == "rejected"
        put(site, film(3))
        take_in(site, ledger)
        assert ledger.value("SELECT count(*) FROM image WHERE patient_key IS NOT NULL") == 1


def test_a_frozen_golden_set_says_what_it_lost_and_freezing_makes_a_new_version(tmp_path):
    site = make_site(
        tmp_path / "site", patients={"golden": 0.9, "golden_next": 0.0, "calibration": 0.0, "validation": 0.0}
    )
    with site.ledger() as ledger:
        put(site, theirs(1))
        for seed in range(2, 12):
            put(site, film(seed), f"{seed}.dcm")
        take_in(site, ledger)
        rows = ledger.rows("SELECT * FROM image WHERE range = 'golden'")
        write_labels(tmp_path / "l.csv", [(row["sop_uid"], "effusion", n % 2) for n, row in enumerate(rows)])
        labels.import_csv(site, ledger, tmp_path / "l.csv", "test")
        before = golden.freeze(site, ledger, "test")
        key = next(row["patient_key"] for row in rows)
        said = forget.forget(site, ledger, [key], *WHO, refuse=False)
        assert said["state"] == "done"
        assert said["golden"] == [{"version": 1, "films": 1}]
        shown = golden.show(site, ledger)
        assert (shown["version"], shown["lost"], shown["images"]) == (1, 1, before["images"] - 1)
        assert shown["sha256"] == before["sha256"]
        assert "golden set" in {alert["kind"] for alert in status(site, ledger)["alerts"]}
        again = golden.freeze(site, ledger, "test")
        assert (again["version"], again["lost"], again["images"]) == (2, 0, before["images"] - 1)
        assert "golden set" not in {alert["kind"] for alert in status(site, ledger)["alerts"]}


def test_models_that_learnt_from_a_film_are_named_and_those_that_descend_from_them(lived_in):
    site, _ = lived_in
    with site.ledger() as ledger:
        with ledger.transaction():
            for number, (bundle, parent) in enumerate((("b" * 12, None), ("c" * 12, "b" * 12), ("d" * 12, None)), 1):
                name = f"r{number:04d}"
                if number > 1:
                    ledger.insert("round", id=number, name=name, state="passed", why="now", recipe="distl", parent=parent,
                                  last_image=99, planned_at=utc())  # fmt: skip
                ledger.insert("bundle", id=bundle, round=name, state="candidate", created_at=utc())
        said = forget.preview(site, ledger, [the_key(site)])
    assert [(one["bundle"][0], one["directly"]) for one in said["bundles"]] == [("b", True), ("c", False)]
    assert said["cancels"] == ["r0001"]


def test_a_round_under_way_is_cancelled_and_waited_for(lived_in, monkeypatch):
    site, bits = lived_in
    monkeypatch.setattr(forget_rounds, "LEAVES_S", 0.1)
    with site.ledger() as ledger:
        with held(site.rounds / "r0001"):  # a learner at work
            said = forget.forget(site, ledger, [the_key(site)], *WHO, refuse=False)
            assert said["state"] == "pending"
            assert "learner has not left" in said["pending"]
            assert rounds.get(ledger, "r0001")["state"] == "cancelled"
            assert "forget" in {alert["kind"] for alert in status(site, ledger)["alerts"]}
        assert housekeeping(site, NOW) == "done"
        assert found(site, bits) == []
        manifest = json.loads((site.rounds / "r0001" / "manifest.json").read_text())
        assert len(manifest["films"]) == 6


def test_a_round_that_is_just_being_planned_is_waited_for(lived_in):
    site, bits = lived_in
    manifest = site.rounds / "r0001" / "manifest.json"
    kept = json.loads(manifest.read_text())
    manifest.unlink()
    with site.ledger() as ledger:
        with training.the_lock(site):
            assert forget.forget(site, ledger, [the_key(site)], *WHO, refuse=False)["state"] == "pending"
            write_json(manifest, kept)
        assert forget.finish(site, ledger) is None
        assert found(site, bits) == []


def test_a_reader_of_the_ledger_delays_the_last_step_only(lived_in):
    site, bits = lived_in
    with site.ledger() as ledger:
        ledger.db.execute("PRAGMA busy_timeout = 100")
        reader = sqlite3.connect(site.root / "ledger.db", isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM image").fetchone()
        said = forget.forget(site, ledger, [the_key(site)], *WHO, refuse=False)
        assert said["state"] == "pending"
        assert [name for name, _ in found(site, bits) if not name.startswith("ledger.db")] == []
        reader.close()
        assert forget.finish(site, ledger) is None
        assert found(site, bits) == []


def test_films_that_the_intake_has_in_hand_are_forgotten_too(site):
    """The intake works while the patient is forgotten: whatever was in the inbox is gone in the end."""
    with site.ledger() as ledger:
        put(site, theirs(0))
        take_in(site, ledger)
    for seed in range(1, 41):
        put(site, theirs(seed) if seed % 2 else film(seed), f"{seed}.dcm")
    stop, errors = threading.Event(), []

    def take() -> None:
        with site.ledger() as mine:
            while not stop.is_set() or site.inbox.waiting():
                try:
                    intake.step(site, mine, Here(site))  # type: ignore[arg-type]
                except FileNotFoundError:  # forgotten between two looks; the agent's loop goes on as well
                    continue
                except BaseException as error:
                    errors.append(error)
                    return

    worker = threading.Thread(target=take, daemon=True)
    worker.start()
    with site.ledger() as ledger:
        try:
            said = forget.forget(site, ledger, [the_key(site)], *WHO, refuse=False)
        finally:
            stop.set()
            worker.join()
        assert errors == []
        assert said["state"] == "done"
        assert ledger.value("SELECT count(*) FROM image WHERE patient_key IS NOT NULL") == 20
    assert found(site, [PATIENT.encode(), the_key(site).encode()]) == []


def test_a_score_or_label_that_was_under_way_finds_nothing_to_hang_on(site):
    with site.ledger() as ledger:
        put(site, theirs(1))
        take_in(site, ledger)
        forget.forget(site, ledger, [the_key(site)], *WHO, refuse=False)
        with ledger.transaction():
            ledger.insert("prediction", image=1, bundle="b", probabilities="{}", at=utc())
            ledger.insert("label", image=1, finding="effusion", value=1, source="report", by="x", at=utc())
        assert ledger.value("SELECT count(*) FROM prediction") == ledger.value("SELECT count(*) FROM label") == 0


def test_outside_of_forget_nothing_leaves_the_append_only_tables(lived_in):
    site, _ = lived_in
    with site.ledger() as ledger:
        forget.forget(site, ledger, [the_key(site)], *WHO, refuse=False)
        for table in ("prediction", "label"):
            for sql in (f"DELETE FROM {table}", f"UPDATE {table} SET at = ''"):
                with pytest.raises(sqlite3.IntegrityError, match="append-only"), ledger.transaction():
                    ledger.run(sql)


def die_forgetting(root: Path, k: int) -> None:
    site = Site.open(root / "appliance.toml")
    with site.ledger() as ledger:
        count_steps(k)
        forget.forget(site, ledger, [the_key(site)], *WHO, refuse=True)


def start_again(root: Path) -> None:
    assert housekeeping(Site.open(root / "appliance.toml"), NOW) == "done"


def test_a_death_at_any_step_is_finished_by_the_next_start(lived_in, tmp_path):
    base, bits = lived_in
    bits = bits[::7]  # some of each kind, or the searching takes longer than all else
    before = len(found(base, bits))
    for k in range(1, 200):
        root = tmp_path / f"k{k}"
        shutil.copytree(base.root, root)
        code = in_child(die_forgetting, root, k)
        assert code in (0, DIED)
        assert in_child(start_again, root) == 0
        site = Site.open(root / "appliance.toml")
        with site.ledger() as ledger:
            begun = ledger.value("SELECT state FROM forget")
            assert begun in (None, "done")
            assert audit.verify(ledger, root / "audit.heads", site.key("signing.pub"))["ok"]
        assert len(found(site, bits)) == (0 if begun else before), f"died before step {k}"
        shutil.rmtree(root)
        if code == 0:
            break
    assert k > 30


def test_the_command_that_was_killed_is_finished_by_the_same_command(lived_in):
    site, bits = lived_in
    with site.ledger() as ledger:
        forget.forget(site, ledger, [the_key(site)], *WHO, refuse=False)
        with ledger.transaction():
            ledger.run("UPDATE forget SET state = 'bytes'")
        with pytest.raises(Problem, match="nothing of this patient"):
            forget.forget(site, ledger, [the_key(site)], *WHO, refuse=False)
        assert ledger.value("SELECT state FROM forget") == "done"
    assert found(site, bits) == []


def command(site: Site, *words: str, code: int = 0, given: str = "") -> str:
    done = CliRunner().invoke(app, [*words, "--config", str(site.root / "appliance.toml")], input=given)
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.output


def test_the_command_forgets_an_id_from_stdin_and_takes_no_name_as_its_reason(lived_in):
    site, bits = lived_in
    why = ("--by", "Dr Osei", "--reason", "asked for it")
    named = f"wish of {PATIENT.lower()}"
    assert "don't name" in command(site, "forget", PATIENT, "--by", "Dr Osei", "--reason", named, code=1)
    assert "by id" in command(site, "forget", *why, code=2)
    would = json.loads(command(site, "forget", "-", "--dry-run", "--json", given=PATIENT + "\n"))
    assert (would["state"], would["films"]) == ("dry run", 6)
    done = json.loads(command(site, "forget", "-", *why, "--json", given=PATIENT + "\n"))
    assert (done["state"], done["films"], done["later_films"]) == ("done", 6, "taken in again")
    assert found(site, bits) == []
