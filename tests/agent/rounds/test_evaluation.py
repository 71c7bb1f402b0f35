"""Evaluations: what one spends, when the same comparison is paid again, what a crash leaves, and the commands' names of 0.1."""

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from typer.testing import CliRunner

from agent.cli.main import app
from agent.errors import Problem, Refused
from agent.images import labels
from agent.ledger import audit
from agent.release import models, release
from agent.rounds import evaluation, golden_set, inspection, power, records
from agent.rounds.evaluation_budget import budget, for_status
from agent.site import locks
from tests.conftest import make_site
from tests.support.agent.appliance import Appliance
from tests.support.agent.crash_line import write_labels
from tests.support.agent.images import put, take_in, xray
from tests.support.agent.models import FINDINGS, add_model, passed


def with_gate(site, **keys):
    """The site with other gate settings."""
    return replace(site, config=site.config.model_copy(update={"gate": site.config.gate.model_copy(update=keys)}))


def left(site, ledger):
    return for_status(site, ledger, datetime.now(UTC))["evaluations_left"]


def relabel(site, ledger, folder, turn):
    """Labels for every golden image (another `turn`, other labels), frozen."""
    uids = [row["sop_uid"] for row in ledger.rows("SELECT sop_uid FROM image WHERE range = 'golden' ORDER BY id")]
    rows = [(uid, finding, (n + turn) % 2) for n, uid in enumerate(uids) for finding in FINDINGS]
    write_labels(folder / "labels.csv", rows)
    labels.import_csv(site, ledger, folder / "labels.csv", "test")
    return golden_set.freeze(site, ledger, "test")


@pytest.fixture
def judged(tmp_path):
    """A site with a golden set, a baseline in service and a candidate that was not evaluated yet; four evaluations a year."""
    site = make_site(
        tmp_path / "site",
        site={"findings": list(FINDINGS)},
        patients={"golden": 0.9, "golden_next": 0.0, "calibration": 0.0, "validation": 0.0},
        gate={"min_class": 2, "evaluations_per_year": 4, "require_better": False},
    )
    with site.ledger() as ledger:
        for seed in range(12):
            put(site, xray(seed), f"{seed}.dcm")
        take_in(site, ledger)
        relabel(site, ledger, tmp_path, turn=0)
        add_model(site, ledger, 1)
        yield site, ledger, add_model(site, ledger, 2), tmp_path


def test_a_round_without_an_evaluation_due_is_not_evaluated_and_says_how_to_spend_one(judged):
    _, ledger, candidate, _ = judged
    current = records.get(ledger, candidate["round"])
    assert (current.state, candidate["verdict"]) == ("not_evaluated", None)
    assert "`cxrloop evaluate r0001` spends one" in current.reason


def test_the_same_comparison_is_paid_once_and_its_verdict_is_stored(judged):
    site, ledger, candidate, _ = judged
    first = evaluation.evaluate(site, ledger, candidate["bundle"])
    assert (first["round"], first["bundle"]) == (candidate["round"], candidate["bundle"])
    assert first["state"] == first["verdict"]["outcome"] in ("passed", "failed", "inconclusive")
    assert first["verdict"] == inspection.verdict(site, ledger, records.get(ledger, first["round"]))
    assert left(site, ledger) == 3
    assert evaluation.evaluate(site, ledger, candidate["round"]) == first  # by its round as well
    assert left(site, ledger) == 3
    spent = [entry for entry in audit.tail(ledger, 100) if entry["what"] == "evaluation spent"]
    assert [entry["after"]["champion"] for entry in spent] == [models.in_service(ledger).id]


def test_other_rules_another_golden_set_and_another_champion_each_spend_a_new_one(judged):
    site, ledger, candidate, folder = judged
    evaluation.evaluate(site, ledger, candidate["bundle"])
    wide = with_gate(site, margin=0.4)
    evaluation.evaluate(wide, ledger, candidate["bundle"])
    assert left(site, ledger) == 2
    assert inspection.verdict(site, ledger, records.get(ledger, candidate["round"]))["margin"] == 0.4
    assert relabel(site, ledger, folder, turn=1)["version"] == 2
    evaluation.evaluate(site, ledger, candidate["bundle"])
    assert left(site, ledger) == 1
    other = add_model(site, ledger, 3)
    release.approve(site, ledger, passed(ledger, other["round"]), "Dr. A", "a better one")
    again = evaluation.evaluate(site, ledger, candidate["bundle"])
    assert left(site, ledger) == 0
    assert again["verdict"]["golden"] == 2
    rows = ledger.rows("SELECT champion, golden, rules FROM evaluation ORDER BY id")
    assert len({tuple(row.values()) for row in rows}) == 4
    assert {row["champion"] for row in rows[:3]} != {rows[3]["champion"]} == {other["bundle"]}


def test_the_newest_verdict_decides_about_the_approval(judged):
    site, ledger, candidate, folder = judged
    rows = ledger.rows("SELECT sop_uid, plate FROM image WHERE range = 'golden' ORDER BY id")
    scores = evaluation.score(site, candidate["bundle"], [row["plate"] for row in rows]).probabilities
    truth = scores > np.median(scores, axis=0)  # the candidate is right about every image
    write_labels(
        folder / "labels.csv",
        [(row["sop_uid"], name, int(truth[n, f])) for n, row in enumerate(rows) for f, name in enumerate(FINDINGS)],
    )
    labels.import_csv(site, ledger, folder / "labels.csv", "test")
    golden_set.freeze(site, ledger, "test")
    wide = with_gate(site, margin=0.49, alpha=0.4)
    assert evaluation.evaluate(wide, ledger, candidate["bundle"])["state"] == "passed"
    strict = with_gate(wide, min_class=100)
    assert evaluation.evaluate(strict, ledger, candidate["bundle"])["state"] == "inconclusive"
    with pytest.raises(Refused, match=r"has not passed its evaluation \(inconclusive: "):
        release.approve(site, ledger, candidate["bundle"], "Dr. A", "please")
    assert records.get(ledger, candidate["round"]).state == "inconclusive"
    assert evaluation.evaluate(wide, ledger, candidate["bundle"])["verdict"]["outcome"] == "passed"  # stored, older
    assert records.get(ledger, candidate["round"]).state == "inconclusive"


def test_a_spent_budget_refuses_and_leaves_the_stored_verdict_readable(judged):
    site, ledger, candidate, folder = judged
    yearly = with_gate(site, evaluations_per_year=1)
    first = evaluation.evaluate(yearly, ledger, candidate["bundle"])
    relabel(site, ledger, folder, turn=1)
    with pytest.raises(Refused, match="alpha is spent"):
        evaluation.evaluate(yearly, ledger, candidate["bundle"])
    assert (
        inspection.verdict(yearly, ledger, records.get(ledger, candidate["round"]))["line"] == first["verdict"]["line"]
    )


def test_what_is_no_candidate_is_refused_and_a_running_round_is_named(judged):
    site, ledger, candidate, _ = judged
    with pytest.raises(Refused, match="it is live; only a candidate"):
        evaluation.evaluate(site, ledger, models.in_service(ledger).id)
    release.reject(ledger, candidate["bundle"], "Dr. A", "no")
    with pytest.raises(Refused, match="it is rejected; only a candidate"):
        evaluation.evaluate(site, ledger, candidate["bundle"])
    with pytest.raises(Problem, match="no such bundle"):
        evaluation.evaluate(site, ledger, "r0099")
    with locks.hold(site, "round"), pytest.raises(Problem, match="a round is running"):
        evaluation.evaluate(site, ledger, candidate["bundle"])
    assert left(site, ledger) == 4


def test_without_a_golden_set_nothing_is_spent(tmp_path):
    site = make_site(tmp_path / "site", site={"findings": list(FINDINGS)})
    with site.ledger() as ledger:
        add_model(site, ledger, 1)
        candidate = add_model(site, ledger, 2)
        with pytest.raises(Problem, match="no golden set is frozen"):
            evaluation.evaluate(site, ledger, candidate["bundle"])
        assert budget(site, ledger, datetime.now(UTC)).spent == 0


def test_a_crash_after_the_payment_is_finished_without_a_second_one_by_the_rules_that_were_paid(judged, monkeypatch):
    site, ledger, candidate, _ = judged

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "_judge", dies)
        with pytest.raises(KeyboardInterrupt):
            evaluation.evaluate(with_gate(site, margin=0.4), ledger, candidate["bundle"])
    current = records.open_round(ledger)
    assert (current.name, current.state) == (candidate["round"], "scored")  # the next start resumes it
    ended = evaluation.finish(site, ledger, current)
    assert ended.state in ("passed", "failed", "inconclusive")
    assert inspection.verdict(site, ledger, ended)["margin"] == 0.4
    assert left(site, ledger) == 3


def test_a_model_that_cannot_be_loaded_costs_nothing(judged):
    site, ledger, candidate, _ = judged
    model = site.models / candidate["bundle"] / "model.onnx"
    model.chmod(0o644)
    model.write_bytes(model.read_bytes() + b"\0")
    with pytest.raises(Exception, match="changed after sealing"):
        evaluation.evaluate(site, ledger, candidate["bundle"])
    assert records.get(ledger, candidate["round"]).state == "not_evaluated"
    assert left(site, ledger) == 4


def test_power_and_status_show_the_names_of_both_versions(judged):
    site, ledger, candidate, _ = judged
    evaluation.evaluate(site, ledger, candidate["bundle"])
    for row in power.power(site, ledger).values():
        assert row["evaluations_left"] == row["looks_left"] == 3
        assert row["power_per_evaluation"] == row["power_per_look"]
    shown = for_status(site, ledger, datetime.now(UTC))
    assert shown == {"looks_left": 3, "evaluations_left": 3, "alpha_left": shown["alpha_left"]}


def test_the_commands_of_version_0_1_still_answer_and_warn(judged):
    site, ledger, candidate, _ = judged
    appliance = Appliance(site)
    evaluated = appliance.ask("evaluate", candidate["round"])
    assert set(evaluated) == {"round", "bundle", "state", "verdict"}
    old, new = appliance.run("gate", candidate["round"]), appliance.run("verdict", candidate["round"])
    assert (old.returncode, old.stdout) == (0, new.stdout)
    assert "`gate` is now `verdict`" in old.stderr and new.stderr == ""
    done = appliance.run("models", "import", str(site.root / "run" / "model1.onnx"), "--look")
    assert "`--look` is now `--evaluate`" in done.stderr and "imported already" in done.stderr
    for words in (["gate", "--help"], ["round", "run", "--help"], ["models", "import", "--help"], ["--help"]):
        shown = CliRunner().invoke(app, words).output
        assert "--look" not in shown
        assert words == ["gate", "--help"] or " gate " not in shown
    assert left(site, ledger) == 3
