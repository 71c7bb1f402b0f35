"""`cxrloop pull` out of a real Orthanc: over every way, interrupted, refused, and gone on with."""

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
from tests.support.agent.pull_command import pull, uids
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
def test_a_patients_priors_come_once(site, orthanc, way):
    mine, other = [xray(n, patient="P1", study_date=f"2026010{n + 1}") for n in range(3)], xray(9, patient="P2")
    orthanc.add(*mine, other)
    source = getattr(orthanc, way)
    said = pull(site, "--from", source, "--patient", "P1", "--dry-run")
    assert (said["found"], said["already"], said["pulled"]) == (3, 0, 0)
    said = pull(site, "--from", source, "--patient", "P1")
    assert (said["from"], said["how"]) == (source, "get" if way == "peer" else "web")
    assert (said["found"], said["already"], said["pulled"], said["failed"], said["waiting"]) == (3, 0, 3, 0, 3)
    assert uids(site) == sorted(one.SOPInstanceUID for one in mine)
    with site.ledger() as ledger:
        take_in(site, ledger)
    said = pull(site, "--from", source, "--patient", "P1")
    assert (said["already"], said["pulled"]) == (3, 0)


@peers
def test_a_back_catalogue_goes_on_after_kill_9(site, orthanc):
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
    said = pull(site, *words)
    assert (said["found"], said["already"], said["pulled"]) == (12, before, 12 - before)
    assert uids(site) == sorted(one.SOPInstanceUID for one in images)


@peers
def test_an_archive_that_dies_and_comes_back_is_waited_for(site, orthanc, monkeypatch):
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
        said = Puller(site, ledger, archive, Order((Query(study="1.2.3.4"),)), progress, wait).run()
    assert (said["found"], said["pulled"], said["failed"]) == (6, 6, 0)
    assert uids(site) == sorted(one.SOPInstanceUID for one in images)


@peers
def test_move_sends_the_images_to_our_running_node(tmp_path, monkeypatch):
    monkeypatch.setattr(pulling, "SETTLE_S", 60)
    site = make_site(tmp_path / "site", retention={"refuse_free_mb": 1})
    with Orthanc(tmp_path / "orthanc", port=site.config.node.port) as orthanc, Appliance(site) as appliance:
        images = [xray(n, patient="P1", study_uid="1.2.3.4", study_date="20260105") for n in range(3)]
        images[2].SOPClassUID = images[2].file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        images[2].Modality, images[2].SeriesInstanceUID = "CT", "1.2.3.4.9"
        orthanc.add(*images)
        said = pull(site, "--from", orthanc.peer, "--study", "1.2.3.4", "--how", "move")
        assert (said["found"], said["pulled"], said["stored"], said["waiting"]) == (2, 2, 2, 0)
        appliance.until("ingest", stored=2)
        orthanc.add(xray(7, patient="P1", study_uid="1.2.3.7"))
        said = pull(site, "--from", orthanc.peer, "--priors", "--how", "move")
        assert (said["found"], said["already"], said["pulled"], said["patients_without_original"]) == (3, 2, 1, 0)


@peers
def test_a_move_that_goes_elsewhere_is_noticed(tmp_path, monkeypatch):
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
def test_a_study_that_is_not_there_is_exit_3_with_its_reason(site, orthanc):
    said = pull(site, "--from", orthanc.peer, "--study", "1.2.3.9", code=3)
    assert (said["found"], said["failed"]) == (0, 1) and "no such study" in next(iter(said["reasons"]))


@peers
def test_an_archive_that_cuts_its_list_short_is_reported(site, tmp_path):
    with Orthanc(tmp_path / "orthanc", LimitFindResults=2) as orthanc:
        orthanc.add(*(xray(n, patient="P1", study_date="20260105") for n in range(4)))
        said = pull(site, "--from", orthanc.peer, "--since", "2026-01-05", "--until", "2026-01-05", code=3)
    assert said["pulled"] == 2 and "cut its list of studies short" in next(iter(said["reasons"]))


@peers
def test_a_name_of_node_peers_will_do(tmp_path):
    with Orthanc(tmp_path / "orthanc") as orthanc:
        site = make_site(tmp_path / "site", node={"peers": [orthanc.peer]}, retention={"refuse_free_mb": 1})
        orthanc.add(xray(1, patient="P1"))
        assert pull(site, "--from", "ORTHANC", "--patient", "P1")["pulled"] == 1


@peers
def test_two_pulls_at_once_are_one_too_many(site, orthanc):
    with (site.root / "run" / "pull.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another `cxrloop pull`" in pull(site, "--from", orthanc.peer, "--patient", "P1", code=1)


@peers
def test_the_log_and_the_audit_know_no_patient(site, orthanc):
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
