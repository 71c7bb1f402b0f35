"""Approve, reject, roll back: who may, which states change, and what a crash leaves."""

from datetime import UTC, datetime, timedelta

import pytest

from agent.errors import Problem, Refused
from agent.ledger import audit
from agent.ledger.states import BUNDLE, ROUND, check
from agent.release import models, release
from agent.rounds import planning
from deploy.bundle import pointer
from tests.conftest import make_site
from tests.support.agent.models import FINDINGS, add_model, passed


@pytest.fixture
def served(tmp_path):
    """A site with a baseline in service and a candidate that passed; no server runs."""
    site = make_site(tmp_path / "site", site={"findings": list(FINDINGS)})
    with site.ledger() as ledger:
        first = add_model(site, ledger, 1)
        second = add_model(site, ledger, 2)
        passed(ledger, second["round"])
        yield site, ledger, first["bundle"], second["bundle"]


def state(ledger, bundle):
    return models.get(ledger, bundle).state


def test_the_first_model_goes_straight_into_service_and_the_audit_says_ungated(served):
    site, ledger, first, _ = served
    assert state(ledger, first) == "live"
    assert models.get(ledger, first).is_baseline
    assert pointer.read(site.root).bundle == first
    assert any(entry["why"] == "first model, ungated" for entry in audit.tail(ledger, 50))


def test_an_approved_bundle_goes_on_probation_and_the_old_one_retires(served):
    site, ledger, first, second = served
    approved = release.approve(site, ledger, second, "Dr. A", "it passed")
    assert approved == {"bundle": second, "state": "probation", "swap_seconds": None}
    assert (state(ledger, first), state(ledger, second)) == ("retired", "probation")
    assert pointer.read(site.root).bundle == second


def test_a_candidate_without_a_passing_verdict_is_refused_and_nothing_moves(served):
    site, ledger, first, _ = served
    third = add_model(site, ledger, 3)
    with pytest.raises(Refused, match="has not passed"):
        release.approve(site, ledger, third["bundle"], "Dr. A", "please")
    assert state(ledger, third["bundle"]) == "candidate"
    assert pointer.read(site.root).bundle == first


def test_name_and_reason_are_needed(served):
    site, ledger, _, second = served
    with pytest.raises(Problem, match="--by NAME"):
        release.approve(site, ledger, second, " ", "it passed")


def test_two_approvers_are_two_people(tmp_path):
    site = make_site(tmp_path / "site", site={"findings": list(FINDINGS)}, release={"approvers": 2})
    with site.ledger() as ledger:
        add_model(site, ledger, 1)
        bundle = passed(ledger, add_model(site, ledger, 2)["round"])
        first = release.approve(site, ledger, bundle, "Dr. A", "it passed")
        assert first == {"bundle": bundle, "state": "requested", "swap_seconds": None}
        with pytest.raises(Refused, match="a second person must approve"):
            release.approve(site, ledger, bundle, "dr. a", "again")
        assert release.approve(site, ledger, bundle, "Dr. B", "I agree")["state"] == "probation"


def test_a_rollback_puts_the_old_one_straight_back_and_withdraws_the_new(served):
    site, ledger, first, second = served
    release.approve(site, ledger, second, "Dr. A", "it passed")
    restored = release.rollback(site, ledger, None, "Dr. B", "alerts doubled")
    assert (restored["bundle"], restored["state"]) == (first, "live")
    assert state(ledger, second) == "withdrawn"
    with pytest.raises(Refused, match="name one with --to"):  # never by itself into what was taken back
        release.rollback(site, ledger, None, "Dr. B", "again")
    assert release.rollback(site, ledger, second, "Dr. B", "it was the scanner")["state"] == "live"


def test_a_rejected_candidate_cannot_be_approved(served):
    site, ledger, _, second = served
    assert release.reject(ledger, second, "Dr. A", "not now")["state"] == "rejected"
    with pytest.raises(Refused, match="rejected"):
        release.approve(site, ledger, second, "Dr. A", "after all")


def test_a_bundle_that_was_changed_after_sealing_is_refused_and_the_old_one_stays(served):
    site, ledger, first, second = served
    model = site.models / second / "model.onnx"
    model.chmod(0o644)
    model.write_bytes(model.read_bytes() + b"\0")
    with pytest.raises(Refused, match="changed after sealing"):
        release.approve(site, ledger, second, "Dr. A", "it passed")
    assert state(ledger, second) == "refused"
    assert pointer.read(site.root).bundle == first


def test_probation_ends_by_itself_after_its_days(served):
    site, ledger, _, second = served
    release.approve(site, ledger, second, "Dr. A", "it passed")
    now = datetime.now(UTC)
    release.reconcile(site, ledger, now + timedelta(days=6))
    assert state(ledger, second) == "probation"
    release.reconcile(site, ledger, now + timedelta(days=8))
    assert state(ledger, second) == "live"


def test_the_ledger_itself_refuses_a_second_model_in_service(served):
    import sqlite3

    _, ledger, _, second = served
    with pytest.raises(sqlite3.IntegrityError), ledger.transaction():
        ledger.run("UPDATE bundle SET state = 'live' WHERE id = ?", second)


def test_every_state_of_the_tables_is_reached_by_some_move_or_is_a_start():
    for table, start in ((ROUND, "planned"), (BUNDLE, "candidate")):
        ends = {state for moves in table.values() for state in moves}
        assert set(table) <= ends | {start}
    with pytest.raises(Refused, match="passed cannot become training"):
        check(ROUND, "round r0001", "passed", "training")


def test_a_failed_withdrawn_or_unjudged_round_is_never_a_parent(served):
    site, ledger, first, second = served
    with ledger.transaction():
        ledger.run("UPDATE bundle SET training_state = 'x' WHERE id IN (?, ?)", first, second)
    assert planning.parent_of_next(ledger).id == second
    release.approve(site, ledger, second, "Dr. A", "it passed")
    release.rollback(site, ledger, None, "Dr. B", "no")
    assert planning.parent_of_next(ledger).id == first
