"""Allow lists of the node: rejections are counted and logged, and only configured addresses are open."""

import logging
import signal
import socket
from pathlib import Path

import pytest

from dicom.client.sender import echo
from dicom.node import refusals
from dicom.node.listener import Listener, Node
from dicom.node.refusals import Refusals
from dicom.store.inbox import Inbox
from tests.conftest import make_site
from tests.support.agent.appliance import Appliance
from tests.support.dicom.pacs import wait_for

LOOPBACK = {"127.0.0.1", "::1"}


@pytest.fixture
def node(tmp_path):
    """A listener with these settings."""
    running = []

    def start(**settings):
        listener = Listener(Node(port=0, **settings), Inbox(tmp_path / "inbox", 0))
        listener.start()
        running.append(listener)
        return listener

    yield start
    for listener in running:
        listener.stop()


def test_each_rejected_association_is_counted_by_its_kind(node):
    listener = node(allow_aet=("CR1",))
    assert echo("127.0.0.1", listener.port, "CXRLOOP", "CR1")
    assert not echo("127.0.0.1", listener.port, "CXRLOOP", "CR9")
    assert not echo("127.0.0.1", listener.port, "WARD", "CR1")
    assert wait_for(lambda: sum(listener.refusals.totals.values()) == 2)
    listener = node(allow_ip=("10.0.0.0/8",))
    assert not echo("127.0.0.1", listener.port, "CXRLOOP")
    assert listener.refusals.totals == {"address": 1}


def test_a_rejection_is_logged_with_the_peers_address_and_the_setting(node, caplog):
    caplog.set_level(logging.INFO)
    listener = node(allow_ip=("10.0.0.0/8",))
    echo("127.0.0.1", listener.port, "CXRLOOP")
    assert "refused address from 127.0.0.1: not in node.allow_ip" in caplog.text


def test_an_ipv4_peer_of_an_ipv6_port_is_matched_by_its_ipv4_address(node):
    listener = node(host="::", allow_ip=("127.0.0.0/8",))
    assert echo("127.0.0.1", listener.port, "CXRLOOP")
    listener = node(host="::", allow_ip=("10.0.0.0/8",))
    assert not echo("127.0.0.1", listener.port, "CXRLOOP")
    listener = node(host="::", allow_ip=("::ffff:127.0.0.0/104",))
    assert echo("127.0.0.1", listener.port, "CXRLOOP")
    listener = node(host="::", allow_ip=("::ffff:10.0.0.0/104",))
    assert not echo("127.0.0.1", listener.port, "CXRLOOP")


def test_counts_continue_after_a_restart_and_are_written_once_a_second(tmp_path):
    path = tmp_path / "refused.json"
    counted = Refusals(logging.getLogger("test"))
    counted.save_to(path)
    for n in range(1000):
        counted.note("10.0.0.9", "address", "not in node.allow_ip", now=100 + n / 1000)
    assert refusals.read_counts(path) == {"address": 1}
    counted.flush(now=102)
    again = Refusals(logging.getLogger("test"))
    again.save_to(path)
    again.note("10.0.0.9", "TLS", "no shared cipher")
    assert again.totals == {"address": 1000, "TLS": 1}


def test_a_damaged_file_of_counts_starts_at_zero(tmp_path):
    (tmp_path / "refused.json").write_bytes(b"\0\0\0")
    counted = Refusals(logging.getLogger("test"))
    counted.save_to(tmp_path / "refused.json")
    assert counted.totals == {}


def test_status_counts_rejections_and_allow_lists_never_exclude_our_own_probe(tmp_path):
    site = make_site(tmp_path / "site", node={"allow_aet": ["CR1"], "allow_ip": ["10.0.0.0/8"]})
    with Appliance(site) as appliance:
        assert not echo("127.0.0.1", site.config.node.port, "CXRLOOP", "CR9")
        assert echo("127.0.0.1", site.config.node.port, "CXRLOOP", "CR1")
        answer = appliance.until("ingest", refused=1)
        assert not {"node down", "not running"} & {alert["kind"] for alert in answer["alerts"]}


# Open ports


def descendants(pid: int) -> set[int]:
    """Return a process and all its descendants."""
    parents = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parents[int(path.name)] = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    pids = {pid}
    while more := {child for child, parent in parents.items() if parent in pids} - pids:
        pids |= more
    return pids


def listening(pids: set[int]) -> set[tuple[str, int]]:
    """Return (address, port) of every TCP socket that listens, and every UDP socket that is bound, of these processes."""
    inodes = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(handle.readlink())
            except FileNotFoundError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    sockets = set()
    for table, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == state and words[9] in inodes:
                address, port = words[1].split(":")
                sockets.add((readable(address), int(port, 16)))
    return sockets


def readable(address: str) -> str:
    """Return an address in the usual form from the kernel's hexadecimal one (32-bit words in this machine's order)."""
    words = b"".join(bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8))
    return socket.inet_ntop(socket.AF_INET if len(words) == 4 else socket.AF_INET6, words)


def test_nothing_listens_beyond_loopback_unless_configured(tmp_path):
    site = make_site(tmp_path / "site")
    with Appliance(site) as appliance:
        assert appliance.process
        ports = listening(descendants(appliance.process.pid))
        assert {port for _, port in ports} == {site.config.node.port, site.config.infer.port}
        assert {address for address, _ in ports} <= LOOPBACK
        appliance.stop(signal.SIGTERM)


def test_opening_the_node_to_the_network_opens_its_port_and_no_other(tmp_path):
    site = make_site(tmp_path / "site", node={"host": "0.0.0.0"})
    with Appliance(site) as appliance:
        assert appliance.process
        ports = listening(descendants(appliance.process.pid))
        assert {(address, port) for address, port in ports if address not in LOOPBACK} == {
            ("0.0.0.0", site.config.node.port)
        }
