"""The night: windows over midnight and clock changes, when a round is worth it, and never two at once."""

import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from agent.images import labels
from agent.release import models
from agent.rounds import evaluation_budget, planning, records, training
from agent.service import scheduler
from agent.service.scheduler import _too_little, night_step
from agent.site import locks
from agent.site.window import next_window, window_at
from tests.conftest import make_site
from tests.support.agent.appliance import TINY
from tests.support.agent.images import put, take_in, xray
from tests.support.agent.models import add_model
from tests.support.agent.rounds import labelled_site

VIENNA = ZoneInfo("Europe/Vienna")
NIGHT = "22:00-05:00"


def at(text: str, tz=VIENNA) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=tz).astimezone(UTC)


def test_a_window_over_midnight_holds_both_sides_of_it():
    evening, morning = (
        window_at(at("2026-01-10T23:00"), NIGHT, VIENNA),
        window_at(at("2026-01-11T04:59"), NIGHT, VIENNA),
    )
    assert evening == morning == (at("2026-01-10T22:00"), at("2026-01-11T05:00"))
    assert window_at(at("2026-01-11T05:00"), NIGHT, VIENNA) is None
    assert window_at(at("2026-01-11T21:59"), NIGHT, VIENNA) is None


def test_the_night_of_a_clock_change_is_an_hour_shorter_or_longer():
    spring = window_at(at("2026-03-29T01:00"), NIGHT, VIENNA)
    autumn = window_at(at("2026-10-25T01:00"), NIGHT, VIENNA)
    assert spring and autumn
    assert spring[1] - spring[0] == timedelta(hours=6)
    assert autumn[1] - autumn[0] == timedelta(hours=8)


def test_a_window_that_starts_in_the_skipped_hour_still_opens():
    span = window_at(at("2026-03-29T03:30"), "02:30-04:00", VIENNA)
    assert span is not None
    assert span[0] < span[1]


def test_the_next_window_is_tonight_or_tomorrow_and_none_without_one():
    assert next_window(at("2026-01-10T12:00"), NIGHT, VIENNA) == at("2026-01-10T22:00")
    assert next_window(at("2026-01-10T23:00"), NIGHT, VIENNA) == at("2026-01-11T22:00")
    assert next_window(at("2026-01-10T23:00"), "", VIENNA) is None


@pytest.fixture
def nightly(tmp_path):
    return make_site(tmp_path / "site", site={"timezone": "UTC"}, learn={"window": NIGHT, "min_new": 5})


def test_nothing_happens_outside_the_window_or_at_an_empty_site(nightly):
    assert night_step(nightly, datetime(2026, 1, 10, 12, tzinfo=UTC)) == "waiting"
    assert night_step(nightly, datetime(2026, 1, 10, 23, tzinfo=UTC)) == "waiting"


def test_a_night_with_too_little_news_is_skipped_once_with_its_reason(nightly):
    put(nightly, xray(1))
    night = datetime(2026, 1, 10, 23, tzinfo=UTC)
    with nightly.ledger() as ledger:
        take_in(nightly, ledger)
        assert night_step(nightly, night) == "skipped"
        assert night_step(nightly, night + timedelta(hours=1)) == "done for tonight"
        assert night_step(nightly, night + timedelta(days=1)) == "skipped"
        rows = ledger.rows("SELECT * FROM round")
    assert [row["state"] for row in rows] == ["skipped", "skipped"]
    assert "fewer than learn.min_new = 5" in rows[0]["reason"]


def test_images_without_labels_are_no_reason_for_a_round(nightly):
    with nightly.ledger() as ledger:
        for seed in range(30):
            put(nightly, xray(seed), f"{seed}.dcm")
        take_in(nightly, ledger)
        assert night_step(nightly, datetime(2026, 1, 10, 23, tzinfo=UTC)) == "skipped"
        assert ledger.value("SELECT reason FROM round").startswith(
            "no labelled image in the train range; import labels"
        )


def test_a_night_after_the_findings_were_renamed_is_skipped_with_its_reason(tmp_path):
    site = labelled_site(tmp_path, window=NIGHT, min_new=1)
    names = site.config.site.model_copy(update={"findings": ("pleural effusion",)})
    renamed = replace(site, config=site.config.model_copy(update={"site": names}))
    with renamed.ledger() as ledger:
        assert night_step(renamed, datetime(2026, 1, 10, 23, tzinfo=UTC)) == "skipped"
        reason = ledger.value("SELECT reason FROM round")
        assert "(pleural effusion); labels there name effusion: import labels of the new findings" in reason


@pytest.mark.parametrize("end", ["stopped", "gave_up", "cancelled"])
def test_images_of_a_round_that_made_no_model_are_new_to_the_next_night(tmp_path, end):
    site = labelled_site(tmp_path, window=NIGHT, min_new=1)
    learn = site.config.learn.model_copy(update={"backbone": "missing.safetensors"})
    site = replace(site, config=site.config.model_copy(update={"learn": learn}))
    night = datetime(2026, 1, 10, 23, tzinfo=UTC)
    with site.ledger() as ledger:
        if end == "stopped":  # the learner finds no backbone
            assert night_step(site, night) == "stopped"
            assert "missing.safetensors" in ledger.value("SELECT reason FROM round")
        else:
            planned = planning.plan(site, ledger, "night", night)
            with ledger.transaction():
                records.advance(ledger, records.advance(ledger, planned, "training"), end)
        put(site, xray(900, patient="new"), "new.dcm")
        take_in(site, ledger)
        assert _too_little(site, ledger) is None
        add_model(site, ledger, 1)  # an imported model learns from no image
        add_model(site, ledger, 2)
        assert _too_little(site, ledger) is None


def test_a_second_round_never_starts_beside_a_running_one(nightly):
    put(nightly, xray(1))
    with locks.hold(nightly, "round"):
        assert night_step(nightly, datetime(2026, 1, 10, 23, tzinfo=UTC)) == "running"
        assert locks.is_held(nightly, "round")
    assert not locks.is_held(nightly, "round")


def test_a_round_that_the_window_ends_is_paused_and_goes_on_the_next_night(tmp_path):
    now = datetime.now(UTC)
    window = f"{now - timedelta(minutes=1):%H:%M}-{now + timedelta(hours=2):%H:%M}"
    site = make_site(
        tmp_path / "site", site={"timezone": "UTC"}, learn={"window": window, "min_new": 5, "recipe": "tiny.toml"}
    )
    (site.root / "tiny.toml").write_text(TINY)
    with site.ledger() as ledger:
        for seed in range(24):
            put(site, xray(seed), f"{seed}.dcm")
        take_in(site, ledger)
        rows = ledger.rows("SELECT sop_uid FROM image")
        text = "".join(f"{row['sop_uid']},effusion,{n % 2}\n" for n, row in enumerate(rows))
        (tmp_path / "labels.csv").write_text("sop_uid,finding,value\n" + text)
        labels.import_csv(site, ledger, tmp_path / "labels.csv", "test")
        with locks.hold(site, "round"):
            planned = planning.plan(site, ledger, "night", now - timedelta(days=1))
            paused = training.carry_on(site, ledger, planned, until=now)  # the window is over at once
        assert paused.state == "paused"
        assert night_step(site, datetime.now(UTC)) == "not_evaluated"
        assert [row["state"] for row in ledger.rows("SELECT state FROM round")] == ["not_evaluated"]
        assert models.in_service(ledger).is_baseline
        assert night_step(site, datetime.now(UTC)) == "skipped"  # the next night brought no new images


def spend(ledger, name, day):
    ledger.insert(
        "evaluation", round=name, bundle="b" * 12, champion="c", baseline="c", golden=1, rules="", alpha=0.01,
        at=f"{day}T00:00:00.000Z",
    )  # fmt: skip


def test_an_evaluation_is_due_one_period_after_the_first_model_and_after_each_evaluation(nightly):
    now = datetime(2026, 6, 1, tzinfo=UTC)
    with nightly.ledger() as ledger:
        assert not evaluation_budget.evaluation_due(nightly, ledger, now)
        with ledger.transaction():
            ledger.insert("bundle", id="b" * 12, state="live", is_baseline=1, created_at="2026-05-20T00:00:00Z")
            ledger.insert(
                "deployment", bundle="b" * 12, state="live", by="x", reason="y", at="2026-05-20T00:00:00.000Z"
            )
        assert evaluation_budget.evaluation_due(nightly, ledger, now)
        assert not evaluation_budget.evaluation_due(nightly, ledger, now - timedelta(days=6))
        with ledger.transaction():
            spend(ledger, "r1", "2026-05-30")
        assert not evaluation_budget.evaluation_due(nightly, ledger, now)
        assert evaluation_budget.evaluation_due(nightly, ledger, now + timedelta(days=6))


def test_the_budget_is_that_of_the_last_365_days(nightly):
    now = datetime(2026, 6, 1, tzinfo=UTC)
    with nightly.ledger() as ledger:
        with ledger.transaction():
            for number, when in enumerate(("2025-05-01", "2025-07-01", "2026-05-01")):
                spend(ledger, f"r{number}", when)
        said = evaluation_budget.budget(nightly, ledger, now)
    assert said == evaluation_budget.Budget(spent=0.02, left=0.03, evaluations_spent=2, evaluations_left=50)


def test_what_one_loop_did_wakes_the_next_at_once(site, monkeypatch):
    monkeypatch.setattr(scheduler, "IDLE_S", 60)
    agent, looked, made, seen = scheduler.Agent(site), threading.Event(), [], threading.Event()

    def make(ledger):
        assert looked.wait(20)  # the other one has found nothing, and waits
        if made:
            return 0
        made.append("an image")
        return 1

    def take(ledger):
        (seen if made else looked).set()
        return 0

    loops = [
        threading.Thread(target=agent._loop, args=("making", make, agent.to_send, agent.to_score)),
        threading.Thread(target=agent._loop, args=("taking", take, agent.to_score)),
    ]
    for loop in loops:
        loop.start()
    try:
        assert seen.wait(20)
    finally:
        for event in (agent.stopping, agent.to_score, agent.to_send):
            event.set()
        for loop in loops:
            loop.join(20)
    assert not any(loop.is_alive() for loop in loops)
