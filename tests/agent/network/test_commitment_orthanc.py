"""Storage commitment asked for by Orthanc: it sends its images, requests commitment and reads our report."""

import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from agent.network import connections
from tests.conftest import make_site
from tests.support.agent.images import take_in, xray
from tests.support.dicom.certificates import authority
from tests.support.dicom.pacs import save, wait_for
from tests.support.ports import free_port

pytestmark = pytest.mark.peer("orthanc")

ABSENT = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "SOPInstanceUID": "1.2.3.4.5.6.7.8.9"}


class Pair:
    """An Orthanc and our listener, configured as peers; over mutual TLS with `hospital` as the authority."""

    def __init__(self, folder, hospital=None):
        self.http, self.dicom = free_port(), free_port()
        ours, suffix = {}, ""
        node = {"AET": "CXRLOOP", "Host": "localhost"}
        self.settings = {
            "StorageDirectory": str(folder / "orthanc"),
            "IndexDirectory": str(folder / "orthanc"),
            "HttpPort": self.http,
            "DicomPort": self.dicom,
            "DicomAet": "ORTHANC",
            "DicomModalities": {"node": node},
            "AuthenticationEnabled": False,
            "RemoteAccessAllowed": False,
            "Plugins": [],
        }
        if hospital:
            us, they = hospital.issue("node", ca=hospital.pem), hospital.issue("orthanc")
            ours = {"tls_cert": str(us.cert), "tls_key": str(us.key), "tls_ca": str(us.ca)}
            suffix, node["UseDicomTls"] = "/tls", True
            self.settings |= {
                "DicomTlsEnabled": True,
                "DicomTlsPrivateKey": str(they.key),
                "DicomTlsCertificate": str(they.cert),
                "DicomTlsTrustedCertificates": str(hospital.pem),
            }
        self.site = make_site(folder / "site", node=ours | {"peers": [f"ORTHANC@localhost:{self.dicom}{suffix}"]})
        node["Port"] = self.site.config.node.port
        self.config = folder / "orthanc.json"
        self.config.write_text(json.dumps(self.settings))
        self.running: list[subprocess.Popen] = []

    def start_orthanc(self):
        program = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.running.append(subprocess.Popen([program, str(self.config)], **quiet))
        assert wait_for(lambda: self.get("/system"), 30)
        return self.running[-1]

    def start_node(self):
        command = [sys.executable, "-m", "agent.cli.main", "serve", "--only", "listen", "--config", str(self.site.root)]
        with (self.site.root / "listen.log").open("ab") as log:
            self.running.append(subprocess.Popen(command, stderr=log))
        assert wait_for(lambda: connections.node_answers(self.site), 30)
        return self.running[-1]

    def restart_node(self):
        self.running[-1].kill()
        self.running[-1].wait()
        self.start_node()

    def stop(self):
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait(20)

    def get(self, path, body=None):
        data = None if body is None else json.dumps(body).encode() if not isinstance(body, bytes) else body
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", data, timeout=30) as answer:
                return json.loads(answer.read())
        except (urllib.error.URLError, ConnectionError):
            return None

    def send(self, folder, count):
        """Let Orthanc send so many images to us; return their SOP instances as its API names them."""
        instances = []
        for n in range(count):
            ds = xray(n)
            self.get("/instances", save(ds, folder / f"{n}.dcm").read_bytes())
            instances.append({"SOPClassUID": ds.SOPClassUID, "SOPInstanceUID": ds.SOPInstanceUID})
        done = self.get("/modalities/node/store", self.get("/instances"))
        assert done and done["FailedInstancesCount"] == 0
        return instances

    def request_commitment(self, instances):
        """Request commitment; return the path of the result."""
        return self.get("/modalities/node/storage-commitment", {"DicomInstances": instances})["Path"]

    def result(self, path):
        assert wait_for(lambda: self.get(path)["Status"] != "Pending", 30)
        answer = self.get(path)
        return answer["Status"], {failure["SOPInstanceUID"]: failure["FailureReason"] for failure in answer["Failures"]}


@pytest.fixture
def pair(tmp_path):
    """Return a function that makes a Pair with both running."""
    made = []

    def start(hospital=None):
        made.append(Pair(tmp_path, hospital))
        made[0].start_orthanc()
        made[0].start_node()
        return made[0]

    yield start
    for started in made:
        started.stop()


@pytest.mark.parametrize("secure", [False, True], ids=["in the clear", "over mutual TLS"])
def test_orthanc_gets_success_for_images_it_sent_and_a_failure_reason_for_others(pair, tmp_path, secure):
    two = pair(authority(tmp_path) if secure else None)
    sent = two.send(tmp_path, 3)
    assert two.result(two.request_commitment(sent)) == ("Success", {})
    assert two.result(two.request_commitment([*sent, ABSENT])) == ("Failure", {ABSENT["SOPInstanceUID"]: 0x0112})
    wrong = {**sent[0], "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1"}
    assert two.result(two.request_commitment([wrong])) == ("Failure", {wrong["SOPInstanceUID"]: 0x0119})


def test_orthanc_gets_a_failure_for_an_image_that_was_damaged_on_disk(pair, tmp_path):
    two = pair()
    sent = two.send(tmp_path, 2)
    with two.site.ledger() as ledger:
        take_in(two.site, ledger)
        rows = {row["sop_uid"]: row["original"] for row in ledger.rows("SELECT * FROM image")}
    assert two.result(two.request_commitment(sent)) == ("Success", {})
    uid = sent[0]["SOPInstanceUID"]
    path = two.site.root / "store" / rows[uid]
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(damaged)
    assert two.result(two.request_commitment(sent)) == ("Failure", {uid: 0x0110})


def test_storing_with_commitment_is_one_job_for_orthanc(pair, tmp_path):
    two = pair()
    for n in range(2):
        two.get("/instances", save(xray(n), tmp_path / f"{n}.dcm").read_bytes())
    job = two.get("/modalities/node/store", {"Resources": two.get("/instances"), "StorageCommitment": True})
    transaction = job["StorageCommitmentTransactionUID"]
    assert two.result(f"/storage-commitment/{transaction}") == ("Success", {})


def test_a_crash_of_the_node_between_request_and_report_only_delays_orthancs_answer(pair, tmp_path):
    two = pair()
    sent = two.send(tmp_path, 2)
    settings = two.site.root / "appliance.toml"
    right = settings.read_text()
    settings.write_text(right.replace(f"localhost:{two.dicom}", f"localhost:{free_port()}"))  # nowhere to report to
    two.restart_node()
    path = two.request_commitment(sent)
    assert len(list((two.site.root / "node" / "commitment").glob("*.json"))) == 1
    assert two.get(path)["Status"] == "Pending"
    settings.write_text(right)
    two.restart_node()
    assert two.result(path) == ("Success", {})
