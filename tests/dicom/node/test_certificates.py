"""Certificates: errors are reported at the start and by `status`; paths; mutual TLS of the appliance."""

import subprocess
import sys
from datetime import UTC, datetime

import pytest

from agent.errors import Problem
from agent.network import connections
from agent.site.config import load
from agent.site.site import Site
from dicom.client.sender import echo
from dicom.errors import BadCertificate
from dicom.node.tls import Identity, check
from tests.conftest import make_site
from tests.support.agent.appliance import Appliance
from tests.support.dicom.certificates import DAY, Usage, authority
from tests.support.dicom.pacs import wait_for


@pytest.fixture
def hospital(tmp_path):
    return authority(tmp_path)


def test_a_valid_pair_returns_its_days_left(hospital):
    assert check(hospital.issue("node", ends=90 * DAY)) in (89, 90)


def test_each_certificate_error_has_its_own_message(hospital, tmp_path):
    good, second_pair = hospital.issue("good"), hospital.issue("other")
    not_pem = tmp_path / "words.pem"
    not_pem.write_text("these are words")
    locked = hospital.issue("locked", password=b"secret")
    wrong = {
        "No such file": Identity(tmp_path / "missing.crt", good.key),
        "not a certificate": Identity(not_pem, good.key),
        "not a private key": Identity(good.cert, not_pem),
        "is not the key of": Identity(good.cert, second_pair.key),
        "pass phrase": locked,
        "expired on": hospital.issue("old", ends=-DAY),
        "both extended key usages": hospital.issue("half", ca=hospital.pem, uses=(Usage.SERVER_AUTH,)),
        "words.pem: not a certificate": Identity(good.cert, good.key, not_pem),
    }
    for message, identity in wrong.items():
        with pytest.raises(BadCertificate, match=message):
            check(identity)


def test_a_key_readable_by_everyone_is_refused(hospital):
    identity = hospital.issue("node")
    identity.key.chmod(0o644)
    with pytest.raises(BadCertificate, match="chmod 600"):
        check(identity)


def test_a_certificate_that_is_not_yet_valid_points_at_the_clock(hospital):
    with pytest.raises(BadCertificate, match="is the clock right"):
        check(hospital.issue("node"), datetime(2020, 1, 1, tzinfo=UTC))


def test_without_tls_ca_a_server_certificate_suffices(hospital):
    assert check(hospital.issue("half", uses=(Usage.SERVER_AUTH,))) > 0


@pytest.mark.parametrize("part", [("--only", "listen"), ()])
def test_serve_refuses_a_certificate_that_does_not_match_its_key(tmp_path, hospital, part):
    one, two = hospital.issue("one"), hospital.issue("two")
    site = make_site(tmp_path / "site", node={"tls_cert": str(one.cert), "tls_key": str(two.key)})
    settings = str(site.root / "appliance.toml")
    command = [sys.executable, "-m", "agent.cli.main", "serve", *part, "--config", settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert (done.stdout + done.stderr).strip().endswith("configure a certificate and key that belong together")


def tls_site(tmp_path, us, **more):
    keys = {"tls_cert": str(us.cert), "tls_key": str(us.key), "tls_ca": str(us.ca or "")}
    return make_site(tmp_path / "site", node=keys | more)


def test_serve_and_status_work_with_mutual_tls(tmp_path, hospital):
    us = authority(tmp_path, "elsewhere").issue("node", ca=hospital.pem)
    site = tls_site(tmp_path, us)
    with Appliance(site) as appliance:
        assert connections.node_answers(site)
        message = appliance.ask("status")
        assert message["ingest"]["refused"] == 0
        assert not {"node down", "not running", "certificate"} & {alert["kind"] for alert in message["alerts"]}
        assert not echo("127.0.0.1", site.config.node.port, "CXRLOOP")
        assert wait_for(lambda: appliance.ask("status")["ingest"]["refused"] == 1)


def test_a_certificate_that_expires_soon_raises_an_alert(tmp_path, hospital):
    site = tls_site(tmp_path, hospital.issue("node", ends=9 * DAY))
    alerts = Appliance(site).ask("status")["alerts"]
    assert "expires in 8 days" in next(alert["detail"] for alert in alerts if alert["kind"] == "certificate")


def test_a_peer_over_tls_needs_a_certificate_of_ours(tmp_path):
    site = make_site(tmp_path / "site", node={"peers": ["PACS@10.0.0.1:2762/tls"]})
    with pytest.raises(Problem, match="needs a certificate of our own"):
        connections.certificate_days_left(site)


def test_certificate_paths_are_relative_to_the_site_folder(tmp_path):
    settings = make_site(tmp_path / "site").root / "appliance.toml"
    text = settings.read_text().replace('tls_cert = ""', 'tls_cert = "keys/node.crt"')
    settings.write_text(text.replace('tls_key = ""', 'tls_key = "keys/node.key"'))
    identity = connections.tls_identity(Site(settings.parent, load(settings)))
    assert identity == Identity(settings.parent / "keys/node.crt", settings.parent / "keys/node.key")
