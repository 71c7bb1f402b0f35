"""How a round is seen: metrics and picture from its files, its pause within a long step, `round show`, `round logs`."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import matplotlib.image
import pytest

from agent.cli import rounds
from agent.rounds import inspection, planning
from learner.__main__ import main
from learner.engine.progress import DEADLINE_S
from learner.round import collapse_limits, metrics_log
from learner.round.figure import draw
from tests.support.agent.rounds import labelled_site
from tests.support.learner.round_folders import make_round, result

ROOT = Path(__file__).resolve().parents[3]
SLACK = 4.0  # seconds that a process may need on a loaded machine to be gone once it has decided to leave


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def drawn(folder):
    picture = matplotlib.image.imread(draw(folder))
    assert picture.shape[0] > 300 and picture.shape[1] > 1000
    assert not list(folder.glob(".*.png"))
    return picture


def red(picture):
    """Share of the title's pixels that are red."""
    title = picture[:60, :700, :3]
    return ((title[..., 0] > 0.6) & (title[..., 1] < 0.3)).mean()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = make_round(tmp_path_factory.mktemp("seen") / "r")
    assert main([str(folder)]) == 0
    return folder


def test_every_step_is_a_row_with_its_phase_its_rates_and_its_monitors(trained):
    read = metrics_log.read(trained)
    assert [(p.name, p.step, p.steps) for p in read.phases] == [("t0", 4, 4), ("distil", 6, 6)]
    assert read.losses[0] == "loss" and {"dino", "classes"} <= set(read.losses)
    for row, corrects in zip(read.phases[1].rows, metrics_log.is_correction(read.phases[1].rows), strict=True):
        assert row["lr"] >= 0
        assert ("momentum" in row) is (set(collapse_limits.LIMITS) <= set(row)) is not corrects
    assert not set(collapse_limits.LIMITS) & set(read.phases[0].rows[0])


def test_small_rates_keep_their_digits(tmp_path):
    folder = make_round(tmp_path / "r", lr=1.23456e-4, validation=0, calibration=0)
    assert main([str(folder)]) == 0
    assert max(row["lr"] for row in rows(folder) if row["phase"] == "distil") == pytest.approx(1.23456e-4 / 4, rel=1e-5)


def test_a_line_that_is_still_being_written_is_left_out(trained, tmp_path):
    text = (trained / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text[:-7])
    assert metrics_log.read(tmp_path).rows == metrics_log.read(trained).rows[:-1]
    assert metrics_log.read(tmp_path / "nowhere").rows == ()


def test_a_round_from_before_rows_said_their_steps_is_read_too(trained, tmp_path):
    old = [{key: value for key, value in row.items() if key != "steps"} for row in rows(trained)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    phases = metrics_log.read(tmp_path).phases
    assert [(phase.name, phase.steps) for phase in phases] == [(phase.name, phase.step) for phase in phases] != []


def test_a_trained_round_is_drawn_in_black_and_can_be_drawn_again(trained):
    assert red(drawn(trained)) == 0
    (trained / "round.png").unlink()
    done = subprocess.run([sys.executable, "-m", "learner.round.figure", str(trained)], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout.decode()) == (0, f"{trained / 'round.png'}\n")


def test_a_collapsed_round_stops_with_monitor_value_and_limit_and_is_drawn_in_red(tmp_path):
    folder = make_round(
        tmp_path / "r", centre_momentum=1.0, lam=1.0, lr=0.2, ema_base=0.5, epochs=40, warmup_epochs=0, correct_every=0
    )
    assert main([str(folder)]) == 3
    assert result(folder)["reason"].startswith("collapse: ")
    assert "max_share 1 is above 0.99, one prototype is assigned to all images" in result(folder)["reason"]
    assert red(drawn(folder)) > 0.01


def test_a_round_whose_loss_is_no_number_is_drawn_up_to_its_last_good_step(tmp_path):
    folder = make_round(tmp_path / "r", lr=1e15, clip=0.0, correct_every=0)
    assert main([str(folder)]) == 3
    assert result(folder)["reason"].startswith("non-finite: ")
    assert all(row["loss"] is not None for row in rows(folder))
    assert red(drawn(folder)) > 0.01


def test_a_round_without_a_step_and_one_with_pseudo_labels_are_drawn_too(trained, tmp_path):
    assert drawn(make_round(tmp_path / "empty")).size
    folder = make_round(tmp_path / "noted")
    note = {"kind": "pseudo", "phase": "distil", "step": 2, "seconds": 1.0, "pseudo_rate": 0.4, "pseudo_auc": 0.8}
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:6], json.dumps(note), *lines[6:], ""]))
    assert metrics_log.read(folder).notes == (note | {"at": 6},)
    assert metrics_log.read(folder).rows == metrics_log.read(trained).rows
    assert drawn(folder).shape[0] > drawn(trained).shape[0]  # one strip more: how good they are


def start(*words):
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip


def wait_until(true, process, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def left_in_time(process):
    begun = time.monotonic()
    process.terminate()
    process.communicate(timeout=60)
    return process.returncode == 75 and time.monotonic() - begun < DEADLINE_S + SLACK


def test_sigterm_within_a_step_of_a_minute_leaves_in_time_and_the_round_goes_on_later(tmp_path):
    long = {"arch": "vit_tiny_patch8_depth4", "image_size": 224, "local_size": 96, "batch": 64, "epochs": 1}
    folder = make_round(tmp_path / "r", train=(4, 60), validation=0, calibration=0, micro_batch=2, t0_epochs=1, **long)
    process = start("-m", "learner", str(folder))
    wait_until((folder / "t0").exists, process)
    time.sleep(3)  # well into the one step of the second phase
    assert left_in_time(process)
    assert result(folder)["state"] == "paused"
    assert result(folder)["reason"] == "SIGTERM, within a step: back to the last checkpoint"
    assert [row["phase"] for row in rows(folder)] == ["t0"]
    assert (folder / "checkpoint/state.safetensors").exists() and not list(folder.glob(".*.tmp"))


BACKWARD = """
import sys, torch
from pathlib import Path
from learner.engine.progress import ProgressWriter
torch.set_num_threads(1)
progress = ProgressWriter(Path(sys.argv[1]), None, 0.0, 0)
progress.handle_signals()
weight = torch.eye(2048, requires_grad=True)
x = weight
for _ in range(int(sys.argv[2])):
    x = x @ weight
print("backward", flush=True)
x.sum().backward()
progress.raise_if_paused()
"""


def test_sigterm_within_a_single_call_of_the_library_leaves_in_time(tmp_path):
    process = start("-c", BACKWARD, str(tmp_path), "60")
    assert process.stdout and process.stdout.readline() == "backward\n"
    assert left_in_time(process)
    assert result(tmp_path)["reason"] == "SIGTERM, within a step: back to the last checkpoint"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A site with two dozen labelled images."""
    return labelled_site(tmp_path_factory.mktemp("site"), epochs=40)


def cxrloop(site, *words):
    return start("-m", "agent.cli.main", *words, "--config", str(site.root / "appliance.toml"))


def output(site, *words):
    process = cxrloop(site, *words)
    text, wrong = process.communicate(timeout=120)
    assert process.returncode == 0, wrong
    return text


def test_logs_are_followed_until_the_round_rests_and_show_says_what_it_did(labelled):
    site = labelled
    folder = site.rounds / "r0001"
    running = cxrloop(site, "round", "run", "--now", "--json")
    wait_until((folder / "progress.json").exists, running)
    following = cxrloop(site, "round", "logs", "--follow")
    leaving = cxrloop(site, "round", "logs", "r0001", "--follow")
    assert leaving.stdout and leaving.stdout.readline()  # it is at it
    leaving.send_signal(signal.SIGINT)
    assert leaving.communicate(timeout=30)[1] == "" and leaving.returncode == 0
    log, last = following.communicate(timeout=240)
    assert running.wait(5) == 0  # the follower leaves when the round has come to rest, not before
    assert following.returncode == 0
    assert log == (folder / "learner.log").read_text()
    assert "export final\n" in log and log.endswith("done\n")
    assert last.startswith("r0001 not_evaluated")
    assert output(site, "round", "logs", "r0001") == log
    document = json.loads(output(site, "round", "logs", "--json"))
    assert document == {
        "round": "r0001",
        "state": "not_evaluated",
        "reason": document["reason"],
        "log": log.splitlines(),
    }

    draw(folder)
    shown = json.loads(output(site, "round", "show", "r0001", "--json"))
    assert {"round", "state", "bundle", "unlabelled", "labelled", "seconds", "verdict"} <= set(shown)
    assert [p["phase"] for p in shown["phases"]] == ["t0", "distil"]
    assert all(p["step"] == p["steps"] for p in shown["phases"])
    assert {"loss", "dino", "classes"} <= set(shown["losses"])
    assert set(shown["monitors"]) == set(collapse_limits.LIMITS)
    assert shown["figure"] == str(folder / "round.png")
    words = output(site, "round", "show", "r0001")
    assert "distil " in words and "teacher_kl " in words and "round.png" in words


def test_what_the_learner_noted_is_shown_with_the_candidate(tmp_path):
    (tmp_path / "final").mkdir()
    noted = {"candidate": "wise 0.5", "notes": ["out of memory: 2 images a pass instead of 4", "and again"]}
    (tmp_path / "final" / "card.json").write_text(json.dumps(noted))
    shown = dict(rounds.learnt(inspection.learning(tmp_path)))
    assert shown == {"candidate": "wise 0.5", "notes": "out of memory: 2 images a pass instead of 4; and again"}


def test_a_round_that_has_not_begun_shows_nothing_yet_and_does_not_hold_a_follower(labelled):
    site = labelled
    with site.ledger() as ledger:
        name = planning.plan(site, ledger, "now", datetime.now(UTC)).name
    assert output(site, "round", "logs", name, "--follow") == ""
    assert inspection.learning(site.rounds / name) == {
        "phases": [], "losses": {}, "monitors": {}, "candidate": None, "notes": [], "figure": None,
        "floor": None, "forgetting": None,
    }  # fmt: skip
    shown = json.loads(output(site, "round", "show", name, "--json"))
    assert (shown["state"], shown["phases"], shown["progress"]) == ("planned", [], None)
    assert os.path.lexists(site.rounds / name / "manifest.json")
