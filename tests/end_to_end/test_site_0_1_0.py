"""A site that version 0.1.0 left behind opens, upgrades, serves, learns on and delivers; always on a copy."""

import hashlib
import json
import shutil
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from agent.results import outbox, reporting
from agent.site.site import Site
from deploy.client import Client
from tests.support.agent.appliance import Appliance
from tests.support.deploy.model_server import start
from tests.support.dicom.storage_scp import Archive
from tests.support.ports import free_ports

SITES = Path(__file__).resolve().parents[1] / "sites"
BASELINE, FIRST, SECOND = "42277d156950", "b28de33b801b", "14be6da4baed"
NO_EVALUATION, INCONCLUSIVE = "not_evaluated", "inconclusive"  # the states of r0001 and r0002
LATER = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def old(tmp_path):
    """The site, copied elsewhere."""
    shutil.copytree(SITES / "0.1.0", tmp_path / "site")
    return tmp_path / "site"


@pytest.fixture
def ask(old):
    """Run a command on the copy; its JSON document."""
    return Appliance(Site.open(old)).ask


def test_the_frozen_site_is_what_version_0_1_0_wrote():
    listed = dict(reversed(line.split()) for line in (SITES / "0.1.0.sha256").read_text().splitlines())
    files = (path for path in (SITES / "0.1.0").rglob("*") if path.is_file())
    found = {path.relative_to(SITES).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert found == listed


def test_status_counts_what_the_site_holds(old):
    done = Appliance(Site.open(old)).run("status")
    said = json.loads(done.stdout)
    assert said["serving"]["bundle"] == BASELINE
    assert said["serving"]["is_baseline"]
    assert said["rounds"]["last"]["state"] == "paused"
    assert said["outbox"]["waiting"] == 1
    counts = {"stored": 9, "predicted": 9, "returned": 7, "labelled": 7, "rejected": 2, "quarantined": 1}
    assert {key: said["ingest"][key] for key in counts} == counts


def test_all_images_are_listed_with_their_states_and_scores(ask):
    images = ask("images", "ls")
    assert Counter(row["state"] for row in images) == {"labelled": 7, "predicted": 2, "rejected": 2, "quarantined": 1}
    assert {row["bundle"] for row in images if row["predictions"]} == {BASELINE}
    assert [row["image"] for row in images if row["superseded_by"]] == [11]
    assert [row["image"] for row in images if row["reason"] == "forgotten"] == [2]


def test_rounds_models_and_the_stored_verdict_are_read(ask):
    assert {row["round"]: row["state"] for row in ask("round", "ls")} == {
        "r0001": NO_EVALUATION,
        "r0002": INCONCLUSIVE,
        "r0003": "paused",
    }
    models = {row["bundle"]: (row["state"], row["round"]) for row in ask("models", "ls")}
    assert models == {BASELINE: ("live", None), FIRST: ("candidate", "r0001"), SECOND: ("candidate", "r0002")}
    verdict = ask("verdict", "r0002")
    assert verdict["outcome"] == INCONCLUSIVE
    assert "needs 98 more patients" in verdict["line"]
    assert {check["outcome"] for check in verdict["checks"] if check["name"] == "vs champion"} == {INCONCLUSIVE}
    assert "no verdict" in ask("verdict", "r0001", code=1)


def test_the_golden_set_and_the_audit_are_whole(ask):
    golden = ask("golden", "show")
    assert (golden["version"], golden["images"], golden["patients"]) == (1, 4, 4)
    assert golden["positives"] == golden["negatives"] == {"cardiomegaly": 2, "effusion": 2}
    audit = ask("audit", "verify")
    assert audit["ok"]
    assert audit["entries"] == 17


def test_the_model_server_answers_with_the_baseline_and_its_old_scores(old):
    with Site.open(old).ledger() as ledger:
        row = ledger.row("SELECT plate, probabilities FROM image JOIN prediction ON image.id = image WHERE image = 3")
    process, url = start(old)
    try:
        with Client(url) as client:
            bundle, findings, scores = client.predict(np.load(old / "store" / row["plate"])[None])
    finally:
        process.kill()
        process.communicate(timeout=10)
    assert bundle == BASELINE
    before = json.loads(row["probabilities"])
    assert scores[0] == pytest.approx([before[name] for name in findings], abs=1e-5)


def test_the_paused_round_goes_on_from_its_checkpoint_to_a_candidate(old, ask):
    metrics = old / "rounds" / "r0003" / "metrics.jsonl"
    before = metrics.read_bytes()
    said = ask("round", "resume")
    assert (said["round"], said["state"], said["unlabelled"], said["labelled"]) == ("r0003", NO_EVALUATION, 3, 2)
    assert metrics.read_bytes().startswith(before)  # the steps before the pause were not made again
    steps = Counter(row.get("phase") for row in map(json.loads, metrics.read_text().splitlines()) if "kind" not in row)
    assert steps == {"t0": 400, "distil": 20}
    made = next(row for row in ask("models", "ls") if row["bundle"] == said["bundle"])
    assert (made["state"], made["round"]) == ("candidate", "r0003")


def test_the_one_waiting_result_reaches_the_pacs(old):
    port = free_ports(2)[0]
    settings = old / "appliance.toml"
    settings.write_text(settings.read_text("utf-8").replace("PACS@127.0.0.1:11119", f"PACS@127.0.0.1:{port}"), "utf-8")
    site = Site.open(old)
    with site.ledger() as ledger, Archive(port) as pacs:
        assert outbox.state(ledger)["waiting"] == 1
        assert reporting.send_due(site, ledger, reporting.PacsLink(), LATER) == 1
        assert outbox.state(ledger)["waiting"] == outbox.state(ledger)["failed"] == 0
        (sent,) = pacs.held.values()
        assert sent.Modality == "OT"
        assert BASELINE in sent.ImageComments
        assert sent.StudyInstanceUID == ledger.value("SELECT study_uid FROM image WHERE id = 12")
