"""TLS on the port: accepted peers, versions and ciphers; silent clients do not delay others."""

import shlex
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import pytest

from deploy.server import health
from dicom.client.sender import echo, send
from dicom.node import tls
from dicom.node.listener import Listener, Node
from dicom.node.tls import Identity, check
from dicom.store.inbox import Inbox
from tests.support.dicom.certificates import authority
from tests.support.dicom.pacs import save, wait_for, xray


@pytest.fixture
def hospital(tmp_path):
    return authority(tmp_path)


@pytest.fixture
def node(tmp_path):
    """Return a function that starts a listener with an identity and returns (listener, inbox)."""
    running = []

    def start(identity, **settings):
        inbox = Inbox(tmp_path / "inbox", 0)
        listener = Listener(Node(port=0, context=tls.server_context(identity), **settings), inbox)
        listener.start()
        running.append(listener)
        return listener, inbox

    yield start
    for listener in running:
        listener.stop()


def echo_succeeds(port, context):
    return echo("127.0.0.1", port, "CXRLOOP", tls=context)


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


# Accepted peers


def test_images_arrive_over_tls_as_they_were_sent(node, hospital, tmp_path):
    us = hospital.issue("node")
    listener, inbox = node(us)
    path = save(xray(side=700, bits=12), tmp_path / "image.dcm")
    items = [path, *(xray(n, side=300) for n in range(4))]
    assert [
        status for _, status in send(items, "127.0.0.1", listener.port, "CXRLOOP", tls=tls.own_node_context(us))
    ] == [0] * 5
    assert path.read_bytes()[-900_000:] in [connection.read_bytes()[-900_000:] for connection in inbox.waiting()]


def test_a_node_with_tls_refuses_plain_connections(node, hospital):
    listener, _ = node(hospital.issue("node"))
    assert not echo("127.0.0.1", listener.port, "CXRLOOP")
    assert wait_for(lambda: listener.refusals.totals.get("TLS") == 1)


def test_with_tls_ca_only_clients_with_its_certificates_are_accepted(node, hospital, tmp_path):
    us = hospital.issue("node", ca=hospital.pem)
    stranger = authority(tmp_path, "elsewhere").issue("pacs", ca=hospital.pem)
    listener, _ = node(us)
    nobody = ssl.create_default_context(cafile=hospital.pem)
    assert echo_succeeds(listener.port, tls.peer_context(hospital.issue("pacs", ca=hospital.pem)))
    assert not echo_succeeds(listener.port, tls.peer_context(stranger))
    assert not echo_succeeds(listener.port, nobody)
    assert wait_for(lambda: listener.refusals.totals.get("TLS") == 2)


def test_tls_ca_may_be_the_certificate_of_a_single_device(node, hospital):
    pacs, second = hospital.issue("pacs"), hospital.issue("other")
    us = hospital.issue("node", ca=pacs.cert)
    listener, _ = node(us)
    assert echo_succeeds(listener.port, tls.peer_context(Identity(pacs.cert, pacs.key, hospital.pem)))
    assert not echo_succeeds(listener.port, tls.peer_context(Identity(second.cert, second.key, hospital.pem)))


def test_our_own_node_is_accepted_whoever_issued_its_certificate(node, hospital, tmp_path):
    us = authority(tmp_path, "elsewhere").issue("node", ca=hospital.pem)
    listener, _ = node(us)
    assert echo_succeeds(listener.port, tls.own_node_context(us))


def test_another_certificate_is_not_accepted_as_our_own_node(node, hospital):
    us, impostor = hospital.issue("node"), hospital.issue("impostor")
    listener, _ = node(impostor)
    assert not echo_succeeds(listener.port, tls.own_node_context(us))


def test_a_peer_must_hold_a_certificate_of_the_authority_for_its_own_host_name(node, hospital, tmp_path):
    us = hospital.issue("us", ca=hospital.pem)
    listener, _ = node(hospital.issue("pacs"))
    assert echo_succeeds(listener.port, tls.peer_context(us))
    assert not echo("127.0.0.2", listener.port, "CXRLOOP", tls=tls.peer_context(us))
    listener, _ = node(authority(tmp_path, "elsewhere").issue("pacs"))
    assert not echo_succeeds(listener.port, tls.peer_context(us))


# Versions and ciphers


def protocol(port, **limits):
    """Return the protocol version of a client with these limits; None when it is refused."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers(limits.pop("ciphers", "ALL") + ":@SECLEVEL=0")
    for name, value in limits.items():
        setattr(context, name, value)
    with socket.create_connection(("127.0.0.1", port), 5) as plain:
        try:
            with context.wrap_socket(plain) as wire:
                return wire.version()
        except (ssl.SSLError, ConnectionResetError):
            return None


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_tls_1_3_is_preferred_1_2_is_accepted_and_1_1_is_refused(node, hospital):
    listener, _ = node(hospital.issue("node"))
    assert protocol(listener.port) == "TLSv1.3"
    assert protocol(listener.port, maximum_version=ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    old = {"minimum_version": ssl.TLSVersion.TLSv1, "maximum_version": ssl.TLSVersion.TLSv1_1}
    assert protocol(listener.port, **old) is None


@pytest.mark.parametrize("ciphers", ["ECDHE+AESGCM", "ECDHE+CHACHA20"])
def test_a_cipher_of_the_profile_is_accepted(node, hospital, ciphers):
    listener, _ = node(hospital.issue("node"))
    assert protocol(listener.port, ciphers=ciphers, maximum_version=ssl.TLSVersion.TLSv1_2)


@pytest.mark.parametrize("ciphers", ["ECDHE+AES+SHA", "ECDHE+AES+SHA256:ECDHE+AES+SHA384:!AESGCM", "aNULL", "kRSA"])
def test_a_cipher_outside_the_profile_is_refused(node, hospital, ciphers):
    listener, _ = node(hospital.issue("node"))
    assert protocol(listener.port, ciphers=ciphers, maximum_version=ssl.TLSVersion.TLSv1_2) is None


# Silent clients


def test_clients_that_connect_and_send_nothing_do_not_delay_others(node, hospital):
    us = hospital.issue("node")
    listener, _ = node(us)
    address = ("127.0.0.1", listener.port)
    silent = [socket.create_connection(address) for _ in range(10)]
    half_open = [socket.create_connection(address) for _ in range(10)]
    for connection in half_open:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a ClientHello
    began = time.monotonic()
    assert echo_succeeds(listener.port, tls.own_node_context(us))
    assert time.monotonic() - began < 2  # seconds; waiting for the silent clients would take 10
    for connection in silent + half_open:
        connection.close()


def test_an_incomplete_handshake_ends_at_the_deadline(node, hospital):
    listener, _ = node(hospital.issue("node"), artim=0.5)
    with socket.create_connection(("127.0.0.1", listener.port), 5) as half_open:
        half_open.sendall(b"\x16\x03\x01\x02\x00\x01")
        assert half_open.recv(1) == b""
    assert wait_for(lambda: listener.refusals.totals == {"TLS": 1})


def test_a_health_check_that_connects_and_closes_is_not_a_refusal(node, hospital):
    us = hospital.issue("node")
    listener, _ = node(us)
    assert health.main(["--tcp", f"127.0.0.1:{listener.port}"]) == 0
    assert echo_succeeds(listener.port, tls.own_node_context(us))
    assert listener.refusals.totals == {}


def test_many_senders_at_once_over_tls_lose_nothing(node, hospital):
    us = hospital.issue("node", ca=hospital.pem)
    listener, inbox = node(us)
    statuses: list[int | None] = []

    def modality(first):
        images = [xray(n, side=200) for n in range(first, first + 4)]
        sent = send(images, "127.0.0.1", listener.port, "CXRLOOP", tls=tls.peer_context(us))
        statuses.extend(status for _, status in sent)

    threads = [threading.Thread(target=modality, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [0] * 16
    assert len(inbox.waiting()) == 16


# The commands of docs/connect.md


def commands(page):
    """Return the words of each `openssl` and `echoscu +tls` line of the page connect.md."""
    lines = [line for line in page.splitlines() if line.startswith(("openssl ", "echoscu +tls"))]
    assert len(lines) == 2
    return [shlex.split(line) for line in lines]


@pytest.mark.peer("dcmtk", "openssl")
def test_the_openssl_and_echoscu_commands_of_the_page_work(node, tmp_path):
    page = Path(__file__).resolve().parents[3] / "docs" / "connect.md"
    openssl, echoscu = commands(page.read_text("utf-8"))
    for name in ("node", "pacs"):
        command = [word.replace("node.", f"{name}.") for word in openssl]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    us = Identity(tmp_path / "node.crt", tmp_path / "node.key", tmp_path / "pacs.crt")
    assert check(us) > 800
    listener, _ = node(us)
    here = ["127.0.0.1", str(listener.port)]
    subprocess.run([*echoscu[:-2], *here], cwd=tmp_path, check=True, capture_output=True, timeout=60)


# dcmtk


@pytest.fixture
def dcmtk(node, hospital, tmp_path):
    """Return a node with mutual TLS, its inbox, and dcmtk's options for a right, a wrong and no certificate."""
    listener, inbox = node(hospital.issue("node", ca=hospital.pem))
    right, wrong = hospital.issue("pacs"), authority(tmp_path, "elsewhere").issue("pacs")
    options = {
        "right": ("+tls", right.key, right.cert, "+cf", hospital.pem),
        "wrong": ("+tls", wrong.key, wrong.cert, "+cf", hospital.pem),
        "none": ("+tla", "+cf", hospital.pem),
        "no TLS": (),
    }
    return listener, inbox, options


@pytest.mark.peer("dcmtk")
@pytest.mark.parametrize("profile", ["+py", "+px", "+pz"])  # non-downgrading, plain and extended BCP 195
def test_echoscu_is_accepted_with_the_right_certificate_in_every_bcp_195_profile(dcmtk, profile):
    listener, _, options = dcmtk
    code, output = run("echoscu", *options["right"], profile, "-aec", "CXRLOOP", "127.0.0.1", listener.port)
    assert code == 0, output


@pytest.mark.peer("dcmtk")
@pytest.mark.parametrize("certificate", ["wrong", "none", "no TLS"])
def test_echoscu_is_refused_without_the_right_certificate(dcmtk, certificate):
    listener, _, options = dcmtk
    code, output = run("echoscu", *options[certificate], "-aec", "CXRLOOP", "127.0.0.1", listener.port)
    assert code != 0, output
    assert wait_for(lambda: listener.refusals.totals == {"TLS": 1})


@pytest.mark.peer("dcmtk")
def test_echoscu_with_the_old_aes_profile_is_refused(dcmtk):
    listener, _, options = dcmtk
    code, output = run("echoscu", *options["right"], "+pa", "-aec", "CXRLOOP", "127.0.0.1", listener.port)
    assert code != 0, output


@pytest.mark.peer("dcmtk")
def test_storescu_delivers_over_tls(dcmtk, tmp_path):
    listener, inbox, options = dcmtk
    images = [save(xray(n, side=400, bits=12), tmp_path / f"{n}.dcm") for n in range(3)]
    code, output = run("storescu", *options["right"], "-aec", "CXRLOOP", "127.0.0.1", listener.port, *images)
    assert code == 0, output
    assert len(inbox.waiting()) == 3
