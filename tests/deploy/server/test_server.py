"""The model server over real HTTP: answers and refusals."""

import io
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest

from deploy.client import Client
from deploy.errors import ServerDown, ServerRefused
from tests.support.deploy.model_server import FINDINGS, GRID, ROOT, Site, TwoBundles, plates, serving


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A site with sealed bundles a and b; each test sets the pointer it needs."""
    return TwoBundles(tmp_path_factory.mktemp("server") / "s")


@pytest.fixture(scope="module")
def server(site):
    """One server for the tests that only send requests."""
    with serving(site) as (_, client):
        yield client


def post(client, path, **arguments):
    return httpx.post(client.url + path, trust_env=False, timeout=60, **arguments)


def npy(array, **save):
    body = io.BytesIO()
    np.save(body, array, **save)
    return body.getvalue()


def test_an_answer_names_the_bundle_and_a_probability_for_each_finding(site, server):
    bundle, findings, probabilities = server.predict(plates(3))
    assert (bundle, findings, probabilities.shape) == (site.a, FINDINGS, (3, len(FINDINGS)))
    assert ((probabilities > 0) & (probabilities < 1)).all()


def test_an_answer_has_heatmaps_only_on_request(site, server):
    images = plates(3)
    bundle, findings, probabilities, heatmaps = server.explain(images)
    assert (bundle, findings, heatmaps.shape) == (site.a, FINDINGS, (3, len(FINDINGS), GRID, GRID))
    assert (probabilities == server.predict(images)[2]).all()
    cells = images.reshape(3, GRID, 512 // GRID, GRID, 512 // GRID).mean((2, 4)) / 255
    assert np.allclose(heatmaps[:, 0], cells, atol=1e-4)
    assert set(post(server, "/predict", content=npy(images)).json()) == {"bundle", "findings", "probabilities"}


def test_readiness_names_bundle_provider_and_start(site, server):
    state = server.ready()
    assert (state["bundle"], state["provider"], state["refused"]) == (site.a, "cpu", None)
    assert state["since"].endswith("Z")


def huge_header():
    """Return an .npy whose header declares a terabyte."""
    header = io.BytesIO()
    fields = {"descr": "|u1", "fortran_order": False, "shape": (1 << 22, 512, 512)}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "got 0 bytes that are not .npy"),
        (b"\x93NUMPY\x01\x00\x10\x00junk", "not .npy"),
        (npy(np.zeros((1, 512, 512), np.float32)), "got float32 [1, 512, 512]"),
        (npy(np.zeros((512, 512), np.uint8)), "got uint8 [512, 512]"),
        (npy(np.zeros((0, 512, 512), np.uint8)), "got uint8 [0, 512, 512]"),
        (npy(np.zeros((2, 512, 512), np.uint8, order="F")), "Fortran order"),
        (npy(np.zeros((1, 512, 512), np.uint8))[:-1], "got 262143 bytes of data"),
        (npy(np.array([{"a": 1}], object), allow_pickle=True), "got object [1]"),
        (huge_header(), "got uint8 [4194304, 512, 512]"),
    ],
)
def test_a_body_without_plates_is_400_with_got_and_expected(server, body, message):
    answer = post(server, "/predict", content=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]
    assert "expected an .npy of uint8 [N, 512, 512], 1 <= N <= 64" in answer.json()["error"]


def test_a_body_that_is_too_long_is_413_also_without_a_content_length(server):
    long = npy(plates(1)) + bytes(17 << 20)
    assert post(server, "/predict", content=long).status_code == 413
    assert (
        post(server, "/predict", content=(long[i : i + (1 << 20)] for i in range(0, len(long), 1 << 20))).status_code
        == 413
    )


def test_the_client_passes_on_the_reason_of_the_server(server):
    with pytest.raises(ServerRefused, match="got float64") as refused:
        server.predict(np.zeros((1, 512, 512)))
    assert refused.value.status == 400


def test_metrics_count_images_requests_and_name_the_bundle(site, server):
    server.predict(plates(2))
    text = httpx.get(server.url + "/metrics", trust_env=False).text
    assert f'cxrloop_infer_bundle_info{{bundle="{site.a}",provider="cpu"}} 1.0' in text
    assert f'cxrloop_infer_images_total{{bundle="{site.a}"}}' in text
    assert 'cxrloop_infer_requests_total{status="200"}' in text
    assert "cxrloop_infer_seconds_bucket" in text
    assert "cxrloop_infer_swaps_total 0.0" in text


def test_health_answers_while_images_are_scored(tmp_path):
    site = Site(tmp_path / "s")
    site.point(site.add(1, work=4))
    with serving(site) as (_, client):
        url = client.url

        def request():
            with Client(url) as own:
                own.predict(plates(32))

        busy = threading.Thread(target=request)
        busy.start()
        times = []
        while busy.is_alive():
            started = time.perf_counter()
            assert httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
            times.append(time.perf_counter() - started)
        busy.join()
    assert len(times) >= 3 and float(np.median(times)) < 0.5


def test_the_server_listens_on_loopback_only(site):
    done = subprocess.run(
        [sys.executable, "-m", "deploy.server.server", "--site", str(site.site), "--host", "0.0.0.0", "--port", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "listens on loopback only" in done.stderr


def test_a_missing_key_is_503_and_does_not_refuse_the_bundle(tmp_path):
    site = Site(tmp_path / "s")
    in_service, candidate = site.add(1), site.add(2)
    site.point(in_service)
    with serving(site) as (_, client):
        (site.site / "keys/signing.pub").unlink()
        with pytest.raises(ServerDown, match=r"signing.pub: missing; restore the keys folder"):
            client.prepare(candidate)
        assert client.predict(plates(1))[0] == in_service
        assert client.prepare(in_service)["bundle"] == in_service
