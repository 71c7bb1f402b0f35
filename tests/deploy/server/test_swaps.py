"""Bundles swapped under a running model server: swaps under load, refusals, kill and restart."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from deploy.client import Client
from deploy.errors import ServerDown, ServerRefused
from tests.support.deploy.model_server import ROOT, Site, TwoBundles, plates, serving


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A site with sealed bundles a and b; each test sets the pointer it needs."""
    return TwoBundles(tmp_path_factory.mktemp("server") / "s")


def wait_for(condition, seconds=10.0):
    """Return the first true value of condition(), called repeatedly."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not true within {seconds} s")


def test_without_a_model_the_answer_is_503_with_the_reason(tmp_path):
    site = Site(tmp_path / "s")
    bundle = site.add(3)
    with serving(site) as (_, client):
        assert httpx.get(client.url + "/healthz", trust_env=False).status_code == 200
        assert httpx.get(client.url + "/readyz", trust_env=False).status_code == 503
        assert client.ready() is None
        assert client.state()["error"].startswith("no model: run a first round")
        with pytest.raises(ServerDown, match="no model"):
            client.predict(plates(1))
        site.point(bundle)  # the server follows it without a request
        assert wait_for(client.ready)["bundle"] == bundle


def test_a_prepared_bundle_is_swapped_and_rolled_back_within_a_second(site):
    site.point(site.a)
    with serving(site) as (_, client):
        assert client.prepare(site.b)["probe"] <= 1e-5
        assert client.ready()["bundle"] == site.a
        site.point(site.b, site.a)
        swapped = client.reload()
        assert (swapped["bundle"], swapped["previous"]) == (site.b, site.a)
        assert swapped["swap_seconds"] < 1 and swapped["prepared"]
        site.point(site.a, site.b)
        started = time.perf_counter()
        back = client.reload()
        assert client.predict(plates(1))[0] == site.a
        assert time.perf_counter() - started < 1 and back["swap_seconds"] < 1
        assert not client.reload()["changed"]


def test_a_pointer_written_without_a_request_is_followed_within_seconds(site):
    site.point(site.a)
    with serving(site) as (_, client):
        site.point(site.b, site.a)
        wait_for(lambda: client.ready()["bundle"] == site.b, 5)
    site.point(site.a)


def test_no_request_fails_while_bundles_are_swapped_under_load(tmp_path):
    site = Site(tmp_path / "s")
    bundles = [site.add(seed, work=2) for seed in (1, 2, 3)]
    site.point(bundles[0])
    images = plates(4)
    stop, failures, answered = threading.Event(), [], []
    with serving(site) as (_, client):
        expected = {}

        def request():
            with Client(client.url) as own:
                while not stop.is_set():
                    try:
                        bundle, _, probabilities = own.predict(images)
                    except (ServerDown, ServerRefused) as failure:
                        failures.append(failure)
                    else:
                        answered.append((bundle, probabilities))

        senders = [threading.Thread(target=request) for _ in range(4)]
        for sender in senders:
            sender.start()
        swaps = []
        for turn in range(1, 10):  # another bundle each time, prepared and unprepared
            bundle = bundles[turn % 3]
            if turn % 2:
                client.prepare(bundle)
            site.point(bundle, bundles[(turn - 1) % 3])
            swaps.append(client.reload())
            expected[bundle] = client.predict(images)[2]
        stop.set()
        for sender in senders:
            sender.join()
    assert failures == []
    assert {bundle for bundle, _ in answered} == set(bundles)
    for bundle, probabilities in answered:  # the bundle that an answer names computed it
        assert np.allclose(probabilities, expected[bundle], atol=1e-6)
    assert max(swap["swap_seconds"] for swap in swaps if swap["prepared"]) < 1


def bad_bundle(site, how):
    """Return a bundle that must be refused, and the message of the server."""
    if how == "tampered":
        bundle = site.add(21)
        (site.models / bundle / "model.onnx").chmod(0o644)
        with (site.models / bundle / "model.onnx").open("ab") as file:
            file.write(b"\0")
        return bundle, "model.onnx was changed after sealing"
    if how == "unsigned":
        bundle = site.add(22)
        (site.models / bundle / "seal.json").unlink()
        return bundle, "unsigned"
    if how == "plate version":
        return site.add_of_plate_version(2, 23), "plate_version 2, expected 1"
    if how == "probe":
        return site.spoil_probe(24), "its probe differs by 0.5"
    return "0" * 12, "no folder"


@pytest.mark.parametrize("how", ["tampered", "unsigned", "plate version", "probe", "absent"])
def test_a_refused_bundle_never_replaces_the_one_in_service(tmp_path, how):
    site = Site(tmp_path / "s")
    good = site.add(1)
    site.point(good)
    with serving(site) as (_, client):
        bad, message = bad_bundle(site, how)
        with pytest.raises(ServerRefused, match=message):
            client.prepare(bad)
        site.point(bad, good)
        with pytest.raises(ServerRefused, match=message) as refused:
            client.reload()
        assert (refused.value.status, refused.value.bundle) == (409, good)
        assert client.predict(plates(1))[0] == good
        assert message in client.ready()["refused"]
        site.point(good)
        assert client.reload()["bundle"] == good
        assert client.ready()["refused"] is None


def test_a_tampered_pointer_changes_nothing(site):
    site.point(site.a)
    with serving(site) as (_, client):
        pointer = site.site / "current"
        pointer.write_text(pointer.read_text().replace(site.a, site.b))
        with pytest.raises(ServerRefused, match="changed by hand or signed by another key"):
            client.reload()
        assert client.predict(plates(1))[0] == site.a
    site.point(site.a)


def test_a_restarted_server_answers_with_the_pointers_bundle(site):
    site.point(site.a)
    with serving(site) as (process, client):
        before = client.predict(plates(2))
        site.point(site.b, site.a)
        client.reload()
        site.point(site.a, site.b)  # the kill comes before a reload
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with pytest.raises(ServerDown):
            client.predict(plates(2))
    with serving(site) as (_, client):
        after = client.predict(plates(2))
        assert after[0] == before[0] == site.a
        assert np.array_equal(before[2], after[2])


def test_sigterm_stops_within_five_seconds_also_during_a_long_request(tmp_path):
    site = Site(tmp_path / "s")
    site.point(site.add(1, work=40))
    with serving(site) as (process, client):

        def lost_request():
            with Client(client.url) as own, contextlib.suppress(ServerDown, ServerRefused):
                own.predict(plates(64))

        sender = threading.Thread(target=lost_request)
        sender.start()
        time.sleep(0.5)
        started = time.monotonic()
        process.terminate()
        assert process.wait(10) == 0
        assert time.monotonic() - started < 5
        sender.join()


def test_the_server_stops_when_its_parent_was_killed(site):
    site.point(site.a)
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.support.deploy.model_server import start\n"
        f"process, url = start(Path({str(site.site)!r}), '--die-with-parent')\n"
        "print(process.pid, url, flush=True)\nprocess.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pid, url = parent.stdout.readline().split()
    with Client(url) as client:
        assert client.ready()
        parent.kill()
        parent.communicate()
        wait_for(lambda: not alive(int(pid)), 5)
        assert client.state() is None


def alive(pid):
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
