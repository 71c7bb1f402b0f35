"""Rounds that have ended keep their evidence, lose their working files, and later their training state."""

import shutil
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from agent.erasure import forget
from agent.release import models
from agent.results import attribution
from agent.rounds import evaluation, inspection, planning, records, tidying, training
from agent.service.scheduler import housekeeping
from agent.site.files import open_sealed
from agent.site.site import Site
from learner.round.folder import lock_round
from tests.support.agent.models import passed
from tests.support.agent.rounds import labelled_site

NOW = datetime.now(UTC)
EVIDENCE = {"manifest.json", "result.json", "metrics.jsonl", "learner.log", "round.png", "final"}


@pytest.fixture(scope="module")
def three_rounds(tmp_path_factory):
    """A site with three trained rounds: r0001 made the baseline, r0002 has passed, r0003 is the newest."""
    site = labelled_site(tmp_path_factory.mktemp("tidying"))
    with site.ledger() as ledger:
        for _ in range(3):
            current = training.carry_on(site, ledger, planning.plan(site, ledger, "now", NOW))
            assert current.state == "not_evaluated", current.reason
            if current.name == "r0002":
                passed(ledger, current.name)
    return site


@pytest.fixture
def site(three_rounds, tmp_path):
    """A copy that keeps the training state of the newest round only."""
    shutil.copytree(three_rounds.root, tmp_path / "site")
    copy = Site.open(tmp_path / "site" / "appliance.toml")
    retention = copy.config.retention.model_copy(update={"rounds": 1})
    return replace(copy, config=copy.config.model_copy(update={"retention": retention}))


def states(site):
    return {path.relative_to(site.rounds).as_posix() for path in site.rounds.rglob("state.safetensors")}


def test_working_files_go_and_the_evidence_stays(site):
    assert (site.rounds / "r0003" / "checkpoint").is_dir()
    (site.rounds / "r0003" / "shard").mkdir()  # as a learner that was killed leaves it
    assert housekeeping(site, NOW) == "done"
    for name in ("r0001", "r0002", "r0003"):
        left = {path.name for path in (site.rounds / name).iterdir()}
        assert EVIDENCE <= left <= tidying.KEPT
        assert (site.rounds / name / "final" / "card.json").exists()
        assert not (site.rounds / name / "final" / "model.onnx").exists()
        assert inspection.learning(site.rounds / name)["phases"]
    with site.ledger() as ledger:
        for name in ("r0001", "r0002", "r0003"):
            open_sealed(site, records.get(ledger, name).bundle)


def test_training_states_of_possible_parents_and_of_the_newest_round_stay(site):
    with site.ledger() as ledger:
        dropped = records.get(ledger, "r0001").bundle
        while tidying.step(site, ledger):
            pass
        assert states(site) == {
            "r0001/t0/state.safetensors", "r0002/final/state.safetensors", "r0003/final/state.safetensors",
        }  # fmt: skip
        assert models.get(ledger, dropped).training_state is None
        bundle = open_sealed(site, dropped)
        with pytest.raises(Exception, match=r"removed by retention\.rounds"):
            attribution._training_state(site, ledger, bundle, "ig")


def test_the_next_round_starts_from_the_passed_round_after_tidying(site):
    with site.ledger() as ledger:
        while tidying.step(site, ledger):
            pass
        current = training.carry_on(site, ledger, planning.plan(site, ledger, "now", NOW))
        assert (current.state, current.parent) == ("not_evaluated", records.get(ledger, "r0002").bundle)


def test_a_round_that_has_not_ended_keeps_its_files_and_its_parent(site):
    with site.ledger() as ledger:
        with ledger.transaction():
            ledger.run("UPDATE round SET state = 'paused', parent = ?", records.get(ledger, "r0001").bundle)
            ledger.run("UPDATE round SET state = 'not_evaluated' WHERE name != 'r0003'")
        while tidying.step(site, ledger):
            pass
        assert (site.rounds / "r0003" / "checkpoint").is_dir()
        assert "r0001/final/state.safetensors" in states(site)


def test_a_cancelled_round_waits_for_its_learner(site):
    with site.ledger() as ledger, lock_round(site.rounds / "r0003"):
        tidying.step(site, ledger)
        assert (site.rounds / "r0003" / "checkpoint").is_dir()
    with site.ledger() as ledger:
        assert tidying.step(site, ledger) == 1
        assert not (site.rounds / "r0003" / "checkpoint").exists()


def test_zero_keeps_all_training_states(site):
    retention = site.config.retention.model_copy(update={"rounds": 0})
    site = replace(site, config=site.config.model_copy(update={"retention": retention}))
    before = {state for state in states(site) if "checkpoint" not in state}
    assert housekeeping(site, NOW) == "done"
    assert states(site) == before


def test_a_candidate_without_training_state_can_still_be_evaluated(site):
    """The evaluation reads the sealed bundle only; the site lacks a golden set, which it names before any file."""
    with site.ledger() as ledger:
        while tidying.step(site, ledger):
            pass
        with pytest.raises(Exception, match="no golden set is frozen"):
            evaluation.evaluate(site, ledger, "r0001")


def test_forget_clears_the_manifest_of_a_tidied_round(site):
    with site.ledger() as ledger:
        while tidying.step(site, ledger):
            pass
        row = ledger.row("SELECT patient_key FROM image WHERE range = 'train' LIMIT 1")
        answer = forget.forget(site, ledger, [row["patient_key"]], "Dr Osei", "asked", refuse=False)
        assert answer["state"] == "done"
        assert row["patient_key"] not in (site.rounds / "r0001" / "manifest.json").read_text()
