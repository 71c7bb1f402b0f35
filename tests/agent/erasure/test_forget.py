"""`forget`: no byte in the site folder leads to the patient afterwards, wherever the images were."""

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
from learner.round.manifest import read_manifest
from tests.support.agent.crash_line import DIED, count_steps, in_child
from tests.support.agent.images import xray
from tests.support.agent.patient import (
    BY_AND_REASON,
    NOW,
    PATIENT,
    all_files,
    make_patient_site,
    make_site_full_of_patient,
    pseudonym,
    traces,
)


@pytest.fixture
def site(tmp_path):
    return make_patient_site(tmp_path / "site")


@pytest.fixture
def patient_site(full_site, tmp_path):
    """(site, parts): a copy of a site that holds the patient in every place, and bytes that must not be left."""
    base, parts = full_site
    shutil.copytree(base.root, tmp_path / "site")
    return Site.open(tmp_path / "site" / "appliance.toml"), parts


@pytest.fixture(scope="module")
def full_site(tmp_path_factory):
    """(site, parts) that `patient_site` copies, made once."""
    return make_site_full_of_patient(tmp_path_factory.mktemp("life") / "site")


def test_no_trace_of_the_patient_is_left_and_other_patients_keep_everything(patient_site):
    site, parts = patient_site
    with site.ledger() as ledger:
        others = ledger.rows("SELECT * FROM image WHERE patient_key != ? ORDER BY id", pseudonym(site))
        scores = ledger.value("SELECT count(*) FROM prediction")
        result = forget.forget(site, ledger, forget.pseudonyms_of(site, PATIENT, ()), *BY_AND_REASON, refuse=False)
        assert result["state"] == "done"
        assert traces(site, parts) == []
        assert ledger.rows("SELECT * FROM image WHERE patient_key IS NOT NULL ORDER BY id") == others
        assert all(site.store.path(row["original"]).exists() for row in others)
        assert ledger.value("SELECT count(*) FROM prediction") == scores - result["predictions"] == len(others)
        assert ledger.value("SELECT study FROM pulled") == study_mark(
            site.key("pseudonym.key"), xray(20).StudyInstanceUID
        )
        gone = [row["id"] for row in ledger.rows("SELECT id FROM image WHERE reason = 'forgotten'")]
        assert len(gone) == result["images"] == 6  # one corrected, one lateral, one unreadable among them
        for table in forget.tables_with_images(ledger):
            left = {row["image"] for row in ledger.rows(f"SELECT image FROM {table}")}
            assert not left & set(gone), table
        assert audit.verify(ledger, site.root / "audit.heads", site.key("signing.pub"))["ok"]


def test_preview_and_result_have_the_same_counts(patient_site):
    site, _ = patient_site
    with site.ledger() as ledger:
        keys = forget.pseudonyms_of(site, PATIENT, ())
        before = all_files(site.root)
        previewed = forget.preview(site, ledger, keys)
        assert {name: data for name, data in all_files(site.root).items() if "ledger.db" not in name} == {
            name: data for name, data in before.items() if "ledger.db" not in name
        }
        result = forget.forget(site, ledger, keys, *BY_AND_REASON, refuse=False)
        assert {name: result[name] for name in previewed} == previewed
        assert (previewed["images"], previewed["originals"], previewed["aside"], previewed["waiting"]) == (6, 4, 2, 2)
        assert (previewed["predictions"], previewed["labels"], previewed["rounds"]) == (4, 2, ["r0001"])
        with pytest.raises(Problem, match="nothing of this patient is here"):
            forget.forget(site, ledger, keys, *BY_AND_REASON, refuse=False)


def test_audit_and_notices_do_not_identify_the_patient(patient_site):
    site, parts = patient_site
    with site.ledger() as ledger:
        forget.forget(site, ledger, [pseudonym(site)], *BY_AND_REASON, refuse=False)
        entries = ledger.rows("SELECT * FROM audit ORDER BY seq DESC LIMIT 3")
        text = json.dumps(entries) + json.dumps(ledger.rows("SELECT * FROM notice"))
    assert [entry["what"] for entry in entries] == ["patient forgotten", "round cancelled", "patient to be forgotten"]
    assert not any(part in text.encode() for part in parts)


def test_models_trained_on_an_image_and_their_descendants_are_named(patient_site):
    site, _ = patient_site
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
        result = forget.preview(site, ledger, [pseudonym(site)])
    assert [(bundle["bundle"][0], bundle["directly"]) for bundle in result["bundles"]] == [
        ("b", True),
        ("c", False),
        ("e", False),
    ]
    assert result["cancels"] == ["r0001"]


def test_a_running_round_is_cancelled_and_forget_waits_for_its_learner(patient_site, monkeypatch):
    site, parts = patient_site
    monkeypatch.setattr(round_folders, "LEAVE_S", 0.1)
    with site.ledger() as ledger:
        with lock_round(site.rounds / "r0001"):  # a learner at work
            result = forget.forget(site, ledger, [pseudonym(site)], *BY_AND_REASON, refuse=False)
            assert result["state"] == "pending"
            assert "learner has not ended" in result["pending"]
            assert records.get(ledger, "r0001").state == "cancelled"
            assert "forget" in {alert["kind"] for alert in status(site, ledger)["alerts"]}
        assert housekeeping(site, NOW) == "done"
        assert traces(site, parts) == []
        manifest = json.loads((site.rounds / "r0001" / "manifest.json").read_text())
        assert len(manifest["images"]) == 6


def test_a_manifest_of_version_0_1_0_is_cleared_too(patient_site):
    """Manifests of version 1 list their samples under `films`."""
    site, parts = patient_site
    manifest = site.rounds / "r0001" / "manifest.json"
    written = json.loads(manifest.read_text())
    samples = written.pop("images")
    write_json(manifest, {**written, "version": 1, "films": samples})
    with site.ledger() as ledger:
        result = forget.forget(site, ledger, [pseudonym(site)], *BY_AND_REASON, refuse=False)
    assert (result["state"], result["rounds"]) == ("done", ["r0001"])
    assert len(read_manifest(manifest.parent)["images"]) == 6
    assert traces(site, parts) == []


def test_forget_waits_for_a_round_that_is_being_planned(patient_site):
    site, parts = patient_site
    manifest = site.rounds / "r0001" / "manifest.json"
    kept = json.loads(manifest.read_text())
    manifest.unlink()
    with site.ledger() as ledger:
        with locks.hold(site, "round"):
            assert forget.forget(site, ledger, [pseudonym(site)], *BY_AND_REASON, refuse=False)["state"] == "pending"
            write_json(manifest, kept)
        assert forget.finish(site, ledger) is None
        assert traces(site, parts) == []


def test_a_reader_of_the_ledger_delays_only_the_last_step(patient_site):
    site, parts = patient_site
    with site.ledger() as ledger:
        ledger.db.execute("PRAGMA busy_timeout = 100")
        reader = sqlite3.connect(site.root / "ledger.db", isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM image").fetchone()
        result = forget.forget(site, ledger, [pseudonym(site)], *BY_AND_REASON, refuse=False)
        assert result["state"] == "pending"
        assert [name for name, _ in traces(site, parts) if not name.startswith("ledger.db")] == []
        reader.close()
        assert forget.finish(site, ledger) is None
        assert traces(site, parts) == []


def test_only_forget_deletes_from_the_append_only_tables(patient_site):
    site, _ = patient_site
    with site.ledger() as ledger:
        forget.forget(site, ledger, [pseudonym(site)], *BY_AND_REASON, refuse=False)
        for table in ("prediction", "label"):
            for sql in (f"DELETE FROM {table}", f"UPDATE {table} SET at = ''"):
                with pytest.raises(sqlite3.IntegrityError, match="append-only"), ledger.transaction():
                    ledger.run(sql)


def die_forgetting(root: Path, k: int) -> None:
    site = Site.open(root / "appliance.toml")
    with site.ledger() as ledger:
        count_steps(k)
        forget.forget(site, ledger, [pseudonym(site)], *BY_AND_REASON, refuse=True)


def start_again(root: Path) -> None:
    assert housekeeping(Site.open(root / "appliance.toml"), NOW) == "done"


@pytest.mark.timeout(900)  # a death at each step, on a machine that may be busy
def test_after_a_crash_at_any_step_the_next_start_finishes(patient_site, tmp_path):
    base, parts = patient_site
    parts = parts[::7]  # some of each kind, or the searching takes longer than all else
    before = len(traces(base, parts))
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
        assert len(traces(site, parts)) == (0 if begun else before), f"died before step {k}"
        shutil.rmtree(root)
        if code == 0:
            break
    assert k > 30


def test_a_killed_command_is_finished_by_running_it_again(patient_site):
    site, parts = patient_site
    with site.ledger() as ledger:
        forget.forget(site, ledger, [pseudonym(site)], *BY_AND_REASON, refuse=False)
        with ledger.transaction():
            ledger.run("UPDATE forget SET state = 'bytes'")
        with pytest.raises(Problem, match="nothing of this patient"):
            forget.forget(site, ledger, [pseudonym(site)], *BY_AND_REASON, refuse=False)
        assert ledger.value("SELECT state FROM forget") == "done"
    assert traces(site, parts) == []


def command(site: Site, *words: str, code: int = 0, stdin: str = "") -> str:
    done = CliRunner().invoke(app, [*words, "--config", str(site.root / "appliance.toml")], input=stdin)
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.output


def test_the_command_reads_an_id_from_stdin_and_rejects_a_reason_that_names_the_patient(patient_site):
    site, parts = patient_site
    why = ("--by", "Dr Osei", "--reason", "asked for it")
    named = f"wish of {PATIENT.lower()}"
    assert "don't name" in command(site, "forget", PATIENT, "--by", "Dr Osei", "--reason", named, code=1)
    assert "by id" in command(site, "forget", *why, code=2)
    previewed = json.loads(command(site, "forget", "-", "--dry-run", "--json", stdin=PATIENT + "\n"))
    assert (previewed["state"], previewed["images"]) == ("dry run", 6)
    done = json.loads(command(site, "forget", "-", *why, "--json", stdin=PATIENT + "\n"))
    assert (done["state"], done["images"], done["later_images"]) == ("done", 6, "taken in again")
    assert traces(site, parts) == []
