"""`cxrloop pull` from a real Orthanc: by C-GET, C-MOVE and DICOMweb, interrupted and resumed."""

import fcntl
import json
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from agent.cli.main import app
from agent.errors import Problem
from agent.network import pull as pulling
from agent.network.pull import Order, Puller
from dicom.client.archive import Query
from dicom.client.association import Peer
from dicom.client.dimse import Pacs
from dicom.node.listener import Listener, Node
from tests.conftest import make_site
from tests.support.agent.appliance import Appliance
from tests.support.agent.images import take_in, xray
from tests.support.agent.pull_command import inbox_uids, pull
from tests.support.dicom.orthanc import Orthanc
from tests.support.dicom.pacs import wait_for

peers = pytest.mark.peer("orthanc", "orthanc-dicomweb")


@pytest.fixture(autouse=True)
def no_wait_for_an_intake_that_does_not_run(monkeypatch):
    monkeypatch.setattr(pulling, "SETTLE_S", 1)


@pytest.fixture
def orthanc(site, tmp_path):
    with Orthanc(tmp_path / "orthanc", port=site.config.node.port) as server:
        yield server


@peers
@pytest.mark.parametrize("way", ["peer", "web"])
def test_a_patients_priors_are_fetched_once(site, orthanc, way):
    wanted, unwanted = [xray(n, patient="P1", study_date=f"2026010{n + 1}") for n in range(3)], xray(9, patient="P2")
    orthanc.add(*wanted, unwanted)
    source = getattr(orthanc, way)
    answer = pull(site, "--from", source, "--patient", "P1", "--dry-run")
    assert (answer["found"], answer["already"], answer["pulled"]) == (3, 0, 0)
    answer = pull(site, "--from", source, "--patient", "P1")
    assert (answer["from"], answer["how"]) == (source, "get" if way == "peer" else "web")
    assert (answer["found"], answer["already"], answer["pulled"], answer["failed"], answer["waiting"]) == (
        3,
        0,
        3,
        0,
        3,
    )
    assert inbox_uids(site) == sorted(image.SOPInstanceUID for image in wanted)
    with site.ledger() as ledger:
        take_in(site, ledger)
    answer = pull(site, "--from", source, "--patient", "P1")
    assert (answer["already"], answer["pulled"]) == (3, 0)


@peers
def test_a_back_catalogue_resumes_after_kill_9(site, orthanc):
    images = [xray(n, study_date=f"202601{n % 28 + 1:02d}") for n in range(12)]
    orthanc.add(*images)
    words = ["--from", orthanc.peer, "--since", "2026-01-01", "--until", "2026-01-14"]
    command = [sys.executable, "-m", "agent.cli.main", "pull", *words, "--config", str(site.root / "appliance.toml")]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert wait_for(lambda: len(site.inbox.waiting()) >= 3, 40)
    first.kill()
    first.wait()
    before = len(site.inbox.waiting())
    assert before < len(images)
    answer = pull(site, *words)
    assert (answer["found"], answer["already"], answer["pulled"]) == (12, before, 12 - before)
    assert inbox_uids(site) == sorted(image.SOPInstanceUID for image in images)


@peers
def test_a_pull_waits_for_an_archive_that_restarts(site, orthanc, monkeypatch):
    monkeypatch.setattr(pulling, "BACKOFF_S", (1, 1, 1, 1, 1))
    images = [xray(n, study_uid="1.2.3.4") for n in range(6)]
    orthanc.add(*images)
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if seconds >= 1:
            orthanc.__enter__()

    def progress(tally):
        if len(tally.pulled) == 3 and not waits:
            orthanc.stop(signal.SIGKILL)

    archive = Pacs(Peer("ORTHANC", "127.0.0.1", orthanc.port), site.inbox, "get")
    with site.ledger() as ledger:
        answer = Puller(site, ledger, archive, Order((Query(study="1.2.3.4"),)), progress, wait).run()
    assert (answer["found"], answer["pulled"], answer["failed"]) == (6, 6, 0)
    assert inbox_uids(site) == sorted(image.SOPInstanceUID for image in images)


@peers
def test_move_sends_the_images_to_our_running_node(tmp_path, monkeypatch):
    monkeypatch.setattr(pulling, "SETTLE_S", 60)
    site = make_site(tmp_path / "site", retention={"refuse_free_mb": 1})
    with Orthanc(tmp_path / "orthanc", port=site.config.node.port) as orthanc, Appliance(site) as appliance:
        images = [xray(n, patient="P1", study_uid="1.2.3.4", study_date="20260105") for n in range(3)]
        images[2].SOPClassUID = images[2].file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        images[2].Modality, images[2].SeriesInstanceUID = "CT", "1.2.3.4.9"
        orthanc.add(*images)
        answer = pull(site, "--from", orthanc.peer, "--study", "1.2.3.4", "--how", "move")
        assert (answer["found"], answer["pulled"], answer["stored"], answer["waiting"]) == (2, 2, 2, 0)
        appliance.until("ingest", stored=2)
        orthanc.add(xray(7, patient="P1", study_uid="1.2.3.7"))
        answer = pull(site, "--from", orthanc.peer, "--priors", "--how", "move")
        assert (answer["found"], answer["already"], answer["pulled"], answer["patients_without_original"]) == (
            3,
            2,
            1,
            0,
        )


@peers
def test_a_move_to_another_node_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(pulling, "ARRIVE_S", 1)
    site, other = (make_site(tmp_path / name, retention={"refuse_free_mb": 1}) for name in ("site", "other"))
    with Orthanc(tmp_path / "orthanc", port=other.config.node.port) as orthanc:
        orthanc.add(xray(1, study_uid="1.2.3.4"))
        elsewhere = Listener(Node(port=other.config.node.port), other.inbox)
        elsewhere.start()
        archive = Pacs(Peer("ORTHANC", "127.0.0.1", orthanc.port), site.inbox, "move")
        with site.ledger() as ledger, pytest.raises(Problem, match="did not arrive"):
            Puller(site, ledger, archive, Order((Query(study="1.2.3.4"),)), wait=lambda s: None).run()
        elsewhere.stop()


@peers
def test_a_missing_study_exits_with_3_and_a_reason(site, orthanc):
    answer = pull(site, "--from", orthanc.peer, "--study", "1.2.3.9", code=3)
    assert (answer["found"], answer["failed"]) == (0, 1) and "no such study" in next(iter(answer["reasons"]))


@peers
def test_an_archive_that_cuts_its_list_short_is_reported(site, tmp_path):
    with Orthanc(tmp_path / "orthanc", LimitFindResults=2) as orthanc:
        orthanc.add(*(xray(n, patient="P1", study_date="20260105") for n in range(4)))
        answer = pull(site, "--from", orthanc.peer, "--since", "2026-01-05", "--until", "2026-01-05", code=3)
    assert answer["pulled"] == 2 and "cut its list of studies short" in next(iter(answer["reasons"]))


@peers
def test_a_pull_accepts_an_ae_title_of_node_peers(tmp_path):
    with Orthanc(tmp_path / "orthanc") as orthanc:
        site = make_site(tmp_path / "site", node={"peers": [orthanc.peer]}, retention={"refuse_free_mb": 1})
        orthanc.add(xray(1, patient="P1"))
        assert pull(site, "--from", "ORTHANC", "--patient", "P1")["pulled"] == 1


@peers
def test_a_second_pull_at_the_same_time_is_refused(site, orthanc):
    with (site.root / "run" / "pull.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another `cxrloop pull`" in pull(site, "--from", orthanc.peer, "--patient", "P1", code=1)


@peers
def test_log_and_audit_do_not_identify_the_patient(site, orthanc):
    secret = xray(1, patient="SECRET-7", study_date="20260105")
    orthanc.add(secret)
    words = ["pull", "--from", orthanc.web, "--patient", "SECRET-7", "--json"]
    done = CliRunner().invoke(app, [*words, "--config", str(site.root / "appliance.toml")])
    assert json.loads(done.stdout)["pulled"] == 1
    with site.ledger() as ledger:
        trail = json.dumps(ledger.rows("SELECT * FROM audit"))
    for text in (done.stdout, done.stderr, trail):
        assert "SECRET" not in text and str(secret.SOPInstanceUID) not in text
    assert "images pulled" in trail
