"""The whole line with real parts: C-STORE, intake, labels, a round, the gate, approve, roll back; then kill -9."""

import csv
import signal
import time
from pathlib import Path

import pytest

from agent.demo import pacs
from tests.conftest import make_site
from tests.support.agent.appliance import TINY, Appliance, alive, kill


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory):
    """One appliance that the tests below walk in order, and the images of its PACS."""
    folder = tmp_path_factory.mktemp("line")
    site = make_site(
        folder / "site",
        admission={"quality": True},
        learn={"recipe": "tiny.toml", "window": ""},
        gate={"min_class": 10, "evaluations_per_year": 2, "require_better": False},
        release={"probation_days": 0},
    )
    (site.root / "tiny.toml").write_text(TINY)
    images, odd = pacs.phantoms(folder / "pacs", 90, 5)
    with Appliance(site) as appliance:
        yield appliance, images, odd


def write_labels(path: Path, rows: list[dict], truth: dict[str, dict[str, int]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("sop_uid", "finding", "value"))
        for row in rows:
            writer.writerows((row["sop_uid"], name, value) for name, value in truth[row["sop_uid"]].items())
    return path


def test_1_images_are_acknowledged_and_stored_before_there_is_a_model(line):
    appliance, images, odd = line
    sent = [image.path for image in images[:80]] + odd
    statuses = [status for _, status in pacs.deliver(sent, appliance.site.config.node.port, "CXRLOOP")]
    assert statuses == [0] * 84 + [None]  # the file cut in half can't be read by a sender either
    said = appliance.until("ingest", inbox=0, stored=80, rejected=4)
    assert said["serving"] is None
    assert "no model" in [alert["kind"] for alert in said["alerts"]]


def test_2_labels_come_by_csv_and_the_golden_set_is_frozen(line):
    appliance, images, _ = line
    truth = {image.sop_uid: image.truth for image in images}
    rows = [row for row in appliance.ask("images", "ls", "--limit", "1000") if row["range"]]
    path = write_labels(appliance.site.root / "labels.csv", rows, truth)
    said = appliance.ask("labels", "import", str(path))
    assert said == {"rows": 240, "added": 240, "unknown_images": 0, "conflicts": 0}
    golden = appliance.ask("golden", "freeze")
    assert golden["images"] == sum(row["range"] == "golden" for row in rows)
    assert "no model" in appliance.ask("golden", "power", code=1)


def test_3_the_first_round_makes_the_baseline_and_the_backlog_is_scored(line):
    appliance, _, _ = line
    said = appliance.ask("round", "run", "--now")
    assert said["state"] == "not_evaluated"
    assert said["verdict"] is None
    status = appliance.until("ingest", predicted=80)
    models = appliance.ask("models", "ls")
    baseline = next(model for model in models if model["is_baseline"])
    assert status["serving"]["bundle"] == baseline["bundle"]
    assert status["serving"]["provider"] == "cpu"
    assert (baseline["state"], len(models)) == ("live", 2)
    assert "no verdict" in appliance.ask("verdict", said["round"], code=1)
    appliance.ask("approve", said["bundle"], "--by", "Dr. A", "--reason", "please", code=2)


def test_4_an_image_that_comes_now_is_scored_without_being_asked(line):
    appliance, images, _ = line
    port = appliance.site.config.node.port
    assert [s for _, s in pacs.deliver([images[80].path], port, "CXRLOOP")] == [0]
    appliance.until("ingest", predicted=81)
    row = appliance.ask("images", "ls", "--state", "predicted", "--limit", "1")[0]
    assert row["sop_uid"] == images[80].sop_uid
    assert set(row["predictions"]) == {"cardiomegaly", "effusion", "opacity"}


def test_5_an_evaluation_gives_a_verdict_that_reading_does_not_spend(line):
    appliance, _, _ = line
    said = appliance.ask("round", "run", "--now", "--evaluate")
    assert said["state"] in ("passed", "failed", "inconclusive")
    left = appliance.ask("status")["gate"]["evaluations_left"]
    for _ in range(2):
        verdict = appliance.ask("verdict", said["round"])
    again = appliance.ask("evaluate", said["bundle"])  # the same comparison is paid once
    assert (again["round"], again["state"], again["verdict"]) == (said["round"], said["state"], verdict)
    assert verdict["outcome"] == said["state"]
    assert {check["name"] for check in verdict["checks"]} >= {"vs champion", "vs baseline"}
    assert appliance.ask("status")["gate"]["evaluations_left"] == left == 1
    code = 0 if said["state"] == "passed" else 2
    answer = appliance.ask("approve", said["bundle"], "--by", "Dr. A", "--reason", "the verdict", code=code)
    if code == 0:
        assert answer["swap_seconds"] < 5
        assert appliance.ask("rollback", "--by", "Dr. B", "--reason", "to see it")["state"] == "live"


def test_6_explain_and_audit_answer(line):
    appliance, images, _ = line
    picture = appliance.site.root / "heat.png"
    said = appliance.ask("explain", images[0].sop_uid, "-o", str(picture))
    assert 0 <= said["probability"] <= 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert appliance.ask("audit", "verify")["ok"]


@pytest.mark.parametrize("part", ["listen", "infer", "learn"])
def test_7_a_part_that_is_killed_comes_back(line, part):
    appliance, images, _ = line
    pid = appliance.children()[part]
    kill(pid)
    deadline = time.monotonic() + 30
    while appliance.children().get(part, pid) == pid:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)
    number = {"listen": 81, "infer": 82, "learn": 83}[part]
    while [s for _, s in pacs.deliver([images[number].path], appliance.site.config.node.port, "CXRLOOP")] != [0]:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    appliance.until("ingest", stored=number + 1, predicted=number + 1)


def test_8_the_supervisor_may_be_killed_and_nothing_of_it_stays(line):
    appliance, _, _ = line
    parts = appliance.children()
    assert set(parts) == {"listen", "infer", "learn"}
    before = appliance.ask("status")["ingest"]
    appliance.stop(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in parts.values()):
        assert time.monotonic() < deadline, "parts outlive their supervisor"
        time.sleep(0.1)
    appliance.start()
    after = appliance.ask("status")
    assert {key: after["ingest"][key] for key in ("stored", "predicted")} == {
        key: before[key] for key in ("stored", "predicted")
    }
    assert after["serving"] is not None


def test_9_sigterm_stops_everything_within_ten_seconds(line):
    appliance, _, _ = line
    parts = appliance.children()
    assert appliance.stop() < 10
    assert not any(alive(pid) for pid in parts.values())
