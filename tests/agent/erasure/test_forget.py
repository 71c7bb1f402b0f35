"""`forget`: after it no byte in the site folder leads to the patient, whatever the images had become by then."""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agent.cli.main import app
from agent.erasure import forget, round_folders
from agent.errors import Problem
from agent.ledger import audit
from agent.ledger.database import utc
from agent.rounds import records
from agent.service.scheduler import housekeeping
from agent.service.status import status
from agent.site import locks
from agent.site.site import Site
from cxrloop.durable import write_json
from dicom.pseudonyms import study_mark
from learner.round.folder import lock_round
from tests.support.agent.crash_line import DIED, count_steps, in_child
from tests.support.agent.images import xray
from tests.support.agent.patient import NOW, PATIENT, WHO, a_life, a_site, everything, found, the_key


@pytest.fixture
def site(tmp_path):
    return a_site(tmp_path / "site")


@pytest.fixture
def lived_in(whole_life, tmp_path):
    """A copy of a site where the patient's images are everywhere; what must not be found after."""
    base, bits = whole_life
    shutil.copytree(base.root, tmp_path / "site")
    return Site.open(tmp_path / "site" / "appliance.toml"), bits


@pytest.fixture(scope="module")
def whole_life(tmp_path_factory):
    """The site that `lived_in` copies, made once; (site, bits)."""
    return a_life(tmp_path_factory.mktemp("life") / "site")


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
        assert ledger.value("SELECT study FROM pulled") == study_mark(
            site.key("pseudonym.key"), xray(20).StudyInstanceUID
        )
        gone = [row["id"] for row in ledger.rows("SELECT id FROM image WHERE reason = 'forgotten'")]
        assert len(gone) == said["images"] == 6  # one corrected, one lateral, one unreadable among them
        for table in forget.of_an_image(ledger):
            left = {row["image"] for row in ledger.rows(f"SELECT image FROM {table}")}
            assert not left & set(gone), table
        assert audit.verify(ledger, site.root / "audit.heads", site.key("signing.pub"))["ok"]


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
        assert (would["images"], would["originals"], would["aside"], would["waiting"]) == (6, 4, 2, 2)
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


def test_models_that_learnt_from_an_image_are_named_and_those_that_descend_from_them(lived_in):
    site, _ = lived_in
    with site.ledger() as ledger:
        with ledger.transaction():
            for number, (bundle, parent) in enumerate(
                (("b" * 12, None), ("c" * 12, "b" * 12), ("d" * 12, None), ("e" * 12, None)), 1
            ):
                name = f"r{number:04d}"
                if number > 1:
                    ledger.insert("round", id=number, name=name, state="passed", why="now", recipe="distl", parent=parent,
                                  last_image=99, planned_at=utc())  # fmt: skip
                ledger.insert("bundle", id=bundle, round=name, state="candidate", created_at=utc())
        (site.rounds / "r0004").mkdir()
        backbone = str(site.rounds / "r0002" / "backbone.safetensors")
        write_json(site.rounds / "r0004" / "manifest.json", {"images": [], "recipe": {"backbone": backbone}})
        said = forget.preview(site, ledger, [the_key(site)])
    assert [(one["bundle"][0], one["directly"]) for one in said["bundles"]] == [("b", True), ("c", False), ("e", False)]
    assert said["cancels"] == ["r0001"]


def test_a_round_under_way_is_cancelled_and_waited_for(lived_in, monkeypatch):
    site, bits = lived_in
    monkeypatch.setattr(round_folders, "LEAVES_S", 0.1)
    with site.ledger() as ledger:
        with lock_round(site.rounds / "r0001"):  # a learner at work
            said = forget.forget(site, ledger, [the_key(site)], *WHO, refuse=False)
            assert said["state"] == "pending"
            assert "learner has not left" in said["pending"]
            assert records.get(ledger, "r0001")["state"] == "cancelled"
            assert "forget" in {alert["kind"] for alert in status(site, ledger)["alerts"]}
        assert housekeeping(site, NOW) == "done"
        assert found(site, bits) == []
        manifest = json.loads((site.rounds / "r0001" / "manifest.json").read_text())
        assert len(manifest["images"]) == 6


def test_a_round_that_is_just_being_planned_is_waited_for(lived_in):
    site, bits = lived_in
    manifest = site.rounds / "r0001" / "manifest.json"
    kept = json.loads(manifest.read_text())
    manifest.unlink()
    with site.ledger() as ledger:
        with locks.hold(site, "round"):
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


@pytest.mark.timeout(900)  # a death at each step, on a machine that may be busy
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
    assert (would["state"], would["images"]) == ("dry run", 6)
    done = json.loads(command(site, "forget", "-", *why, "--json", given=PATIENT + "\n"))
    assert (done["state"], done["images"], done["later_images"]) == ("done", 6, "taken in again")
    assert found(site, bits) == []
