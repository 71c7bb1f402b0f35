"""Rounds of the appliance under torchrun: trained, paused, stopped and crashed as without it, whatever it exits with."""

import json
from datetime import UTC, datetime

import pytest

from agent.errors import Problem
from agent.images import labels
from agent.rounds import records, training
from agent.site import locks
from tests.conftest import make_site
from tests.support.agent.appliance import TINY, Appliance
from tests.support.agent.images import put, take_in, xray

TORCHRUN = "torchrun --nproc-per-node 2 --max-restarts 3"


@pytest.fixture
def ready(tmp_path):
    """A function: a site with that launcher and enough labelled images for a round."""

    def make(launcher):
        site = make_site(tmp_path / "site", learn={"recipe": "tiny.toml", "launcher": launcher})
        (site.root / "tiny.toml").write_text(TINY)
        with site.ledger() as ledger:
            for seed in range(24):
                put(site, xray(seed), f"{seed}.dcm")
            take_in(site, ledger)
            rows = ledger.rows("SELECT sop_uid FROM image")
            text = "".join(f"{row['sop_uid']},effusion,{n % 2}\n" for n, row in enumerate(rows))
            (tmp_path / "labels.csv").write_text("sop_uid,finding,value\n" + text)
            labels.import_csv(site, ledger, tmp_path / "labels.csv", "test")
        return site

    return make


def carried_on(site, until=None, change=lambda manifest: manifest):
    """The open round, or a new one, taken to its next resting place; `change` spoils a new one's manifest."""
    with site.ledger() as ledger, locks.hold(site, "round"):
        row = records.open_round(ledger)
        if not row:
            row = records.plan(site, ledger, "now", datetime.now(UTC))
            path = site.rounds / row["name"] / "manifest.json"
            path.write_text(json.dumps(change(json.loads(path.read_text()))))
        return training.carry_on(site, ledger, row, until=until)


def test_a_round_that_is_paused_under_torchrun_goes_on_by_command_and_makes_the_first_model(
    ready, tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(scratch := tmp_path / "scratch"))
    scratch.mkdir()
    site = ready(TORCHRUN)
    paused = carried_on(site, until=datetime.now(UTC))  # the window is over at once
    assert (paused["state"], "the window ended" in paused["reason"]) == ("paused", True)
    said = Appliance(site).ask("round", "run", "--now")
    assert (said["round"], said["state"]) == (paused["name"], "no_look")
    assert said["bundle"]
    assert not list(scratch.glob("torchelastic_*"))  # what torchrun writes for each attempt is in the round's folder
    assert (site.rounds / said["round"] / "torchrun").is_dir()


def test_a_round_that_the_learner_stops_under_torchrun_has_its_reason(ready):
    def golden(manifest):
        manifest["images"][0]["range"] = "golden"
        return manifest

    stopped = carried_on(ready(TORCHRUN), change=golden)
    assert stopped["state"] == "stopped"
    assert "golden" in stopped["reason"]


def test_an_earlier_last_word_is_not_taken_for_that_of_a_launcher_that_fails(ready):
    site = ready("false")
    paused = {"state": "paused", "reason": "long ago"}

    def with_old_word(manifest):
        (site.rounds / manifest["round"] / "result.json").write_text(json.dumps(paused))
        return manifest

    given_up = carried_on(site, change=with_old_word)
    assert given_up["state"] == "gave_up"
    assert "exit code 1 3 times" in given_up["reason"]


def test_a_launcher_that_is_not_there_is_named(ready):
    with pytest.raises(Problem, match=r'learn\.launcher = "torchrunn --x": no program torchrunn'):
        carried_on(ready("torchrunn --x"))
