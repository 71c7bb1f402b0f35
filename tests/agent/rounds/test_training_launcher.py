"""Rounds of the appliance under torchrun: trained, paused, stopped and crashed as without it, whatever it exits with."""

import json
import threading
import time
from datetime import UTC, datetime

import pytest

from agent.errors import Problem
from agent.rounds import planning, records, training
from agent.site import locks
from tests.support.agent.appliance import Appliance
from tests.support.agent.rounds import labelled_site

TORCHRUN = "torchrun --nproc-per-node 2 --max-restarts 3"


@pytest.fixture
def ready(tmp_path):
    """A function: a site with that launcher and enough labelled images for a round."""

    def make(launcher):
        return labelled_site(tmp_path, launcher=launcher)

    return make


def carried_on(site, until=None, change=lambda manifest: manifest):
    """Run the open round, or a new one, until it rests; `change` edits the manifest of a new one."""
    with site.ledger() as ledger, locks.hold(site, "round"):
        current = records.open_round(ledger)
        if not current:
            current = planning.plan(site, ledger, "now", datetime.now(UTC))
            path = site.rounds / current.name / "manifest.json"
            path.write_text(json.dumps(change(json.loads(path.read_text()))))
        return training.carry_on(site, ledger, current, until=until)


def test_a_round_that_is_paused_under_torchrun_goes_on_by_command_and_makes_the_first_model(
    ready, tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(scratch := tmp_path / "scratch"))
    scratch.mkdir()
    site = ready(TORCHRUN)
    paused = carried_on(site, until=datetime.now(UTC))  # the window is over at once
    assert (paused.state, "the window ended" in paused.reason) == ("paused", True)
    ended = Appliance(site).ask("round", "run", "--now")
    assert (ended["round"], ended["state"]) == (paused.name, "not_evaluated")
    assert ended["bundle"]
    assert not list(scratch.glob("torchelastic_*"))  # what torchrun writes for each attempt is in the round's folder
    assert (site.rounds / ended["round"] / "torchrun").is_dir()


def test_a_round_that_the_learner_stops_under_torchrun_has_its_reason(ready):
    def golden(manifest):
        manifest["images"][0]["range"] = "golden"
        return manifest

    stopped = carried_on(ready(TORCHRUN), change=golden)
    assert stopped.state == "stopped"
    assert "golden" in stopped.reason


def test_an_earlier_last_word_is_not_taken_for_that_of_a_launcher_that_fails(ready):
    site = ready("false")
    paused = {"state": "paused", "reason": "long ago"}

    def with_old_word(manifest):
        (site.rounds / manifest["round"] / "result.json").write_text(json.dumps(paused))
        return manifest

    given_up = carried_on(site, change=with_old_word)
    assert given_up.state == "gave_up"
    assert "exit code 1 3 times" in given_up.reason


def test_a_launcher_that_is_not_there_is_named(ready):
    with pytest.raises(Problem, match=r'learn\.launcher = "torchrunn --x": no program torchrunn'):
        carried_on(ready("torchrunn --x"))


def test_a_person_cancels_a_running_round_from_another_process(ready, tmp_path):
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    site = ready(str(sleeper))

    def cancel():
        with site.ledger() as ledger:
            while not (current := records.open_round(ledger)) or current.state != "training":
                time.sleep(0.05)
            records.cancel(ledger, current, "Dr. A")

    person = threading.Thread(target=cancel)
    person.start()
    begun = time.monotonic()
    cancelled = carried_on(site)
    person.join()
    assert (cancelled.state, cancelled.reason) == ("cancelled", "by Dr. A")
    assert time.monotonic() - begun < 20  # the learner was stopped, not waited for
