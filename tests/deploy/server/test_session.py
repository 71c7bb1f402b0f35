"""Sessions: the served numbers against a plain numpy oracle, the provider asserted, the probe believed."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest

from deploy import runtime
from deploy.bundle.bundle import open_bundle
from deploy.bundle.keys import read_public
from deploy.bundle.onnx_import import import_onnx
from deploy.errors import BundleRefused, NoAnswer, ProbeMismatch, ProviderUnavailable
from deploy.server.session import Session
from tests.support.deploy.model_server import FINDINGS, ROOT, Site, plates, write_model


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return Site(tmp_path_factory.mktemp("session") / "a")


def opened(site, bundle):
    return open_bundle(site.models, bundle, read_public(site.site / "keys"))


@pytest.fixture(scope="module")
def session(site):
    return Session(opened(site, site.add(1)), "cpu", threads=1)


def test_probabilities_are_the_sigmoid_of_the_plain_computation(session):
    images = plates(3)
    weights = np.random.default_rng(1).normal(size=(16, len(FINDINGS))).astype(np.float32)
    pooled = images.reshape(3, 4, 128, 4, 128).mean((2, 4)).reshape(3, 16) / 255
    answer = session.predict(images)
    assert np.allclose(answer.logits, pooled @ weights, atol=1e-5)
    assert np.allclose(answer.probabilities, 1 / (1 + np.exp(-(pooled @ weights))), atol=1e-6)
    assert np.allclose(answer.embedding, pooled, atol=1e-6)
    assert answer.heatmap.shape == (3, len(FINDINGS), 4, 4)


def test_an_image_scores_the_same_alone_and_among_forty(session):
    images = plates(40)
    together = session.predict(images).probabilities
    assert together.shape == (40, len(FINDINGS))
    assert np.allclose(together[33], session.predict(images[33:34]).probabilities[0], atol=1e-6)


def test_ranks_are_kept_in_the_tails(site):
    bundle = site.add(11, scale=300)
    answer = Session(opened(site, bundle), "cpu", threads=1).predict(plates(8))
    for finding in range(len(FINDINGS)):
        logits, probabilities = answer.logits[:, finding], answer.probabilities[:, finding]
        if logits.max() < 0:  # below zero float64 keeps every rank
            assert (np.argsort(logits) == np.argsort(probabilities)).all()
    assert np.isfinite(answer.probabilities).all()


@pytest.mark.parametrize("wrong", [np.zeros((512, 512), np.uint8), np.zeros((1, 512, 512), np.float32)])
def test_arrays_other_than_plates_are_refused(session, wrong):
    with pytest.raises(ValueError, match=r"expected uint8 \[N, 512, 512\]"):
        session.predict(wrong)


def test_a_bundle_returns_its_sealed_probe_logits(session):
    session.warm()
    assert session.probe() <= 1e-5


def test_a_bundle_with_other_probe_logits_is_refused(site):
    with pytest.raises(ProbeMismatch, match=r"on cpu its probe differs by 0.5 in logits, allowed 0.004"):
        Session(opened(site, site.spoil_probe(12)), "cpu", threads=1).probe()


def test_a_score_that_is_not_finite_is_no_answer(site):
    bundle = site.add(13, white_is_nan=True)
    with pytest.raises(NoAnswer, match=r"image 0 of 2 is not finite"):
        Session(opened(site, bundle), "cpu", threads=1).predict(np.full((2, 512, 512), 255, np.uint8))


def test_a_model_swapped_between_check_and_load_is_refused(site):
    bundle = opened(site, site.add(14))
    (bundle.folder / "model.onnx").chmod(0o644)
    write_model(bundle.folder / "model.onnx", seed=15)
    with pytest.raises(BundleRefused, match="changed after sealing"):
        Session(bundle, "cpu")


def test_weights_outside_the_sealed_file_are_never_read(tmp_path, monkeypatch):
    model = onnx.load(write_model(tmp_path / "m.onnx"))
    onnx.save(model, tmp_path / "e.onnx", save_as_external_data=True, location="e.data", size_threshold=100)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleRefused, match="External data path"):
        import_onnx(tmp_path / "e.onnx", tmp_path / "parts", FINDINGS)


def test_cuda_serves_or_the_error_names_what_to_install(site):
    bundle = opened(site, site.add(16))
    try:
        assert Session(bundle, "cuda").provider == "cuda"  # a machine with a GPU
    except ProviderUnavailable as refused:
        assert "cuda" not in onnxruntime.get_available_providers() or "instead" in str(refused)
        assert "pip install 'cxrloop[gpu]'" in str(refused)


def test_a_session_on_another_provider_is_refused(tmp_path):
    """Without a GPU onnxruntime only warns and returns a session on the CPU."""
    model = write_model(tmp_path / "m.onnx").read_bytes()
    if runtime.running(runtime.load(model, "auto")) == "cpu":
        with pytest.raises(ProviderUnavailable, match=r"onnxruntime runs on cpu instead; pip install 'cxrloop\[gpu\]'"):
            runtime.load(model, "cuda")
    assert runtime.running(runtime.load(model, "cpu")) == "cpu"


def test_an_unknown_provider_is_refused_with_the_known_ones(session):
    with pytest.raises(ProviderUnavailable, match='provider = "tpu": unknown; use "auto", "cuda" or "cpu"'):
        Session(session.bundle, "tpu")


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_importing_deploy_needs_neither_onnxruntime_nor_torch():
    done = python(
        "import sys\n"
        "import deploy, deploy.server.server, deploy.client, deploy.server.session, deploy.bundle.onnx_import, deploy.bundle.pointer, deploy.bundle.keys\n"
        "print([m for m in ('onnxruntime', 'torch', 'timm', 'agent', 'dicom') if m in sys.modules])"
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_serving_without_onnxruntime_names_the_extra(tmp_path):
    done = python(
        "import sys; sys.modules['onnxruntime'] = None\n"  # `import` treats the package as absent
        "from deploy.server.server import main\n"
        f"sys.exit(main(['--site', {str(tmp_path)!r}, '--port', '0']))"
    )
    assert done.returncode == 78
    assert done.stderr == (
        "infer: onnxruntime is not installed: pip install 'cxrloop[gpu]' (NVIDIA) or 'cxrloop[cpu]', never both\n"
    )


def test_scoring_an_image_loads_no_torch(site, session):
    done = python(
        "import sys, numpy as np, pathlib\n"
        "from deploy.bundle.bundle import open_bundle; from deploy.server.session import Session; from deploy.bundle.keys import read_public\n"
        f"site = pathlib.Path({str(site.site)!r})\n"
        f"s = Session(open_bundle(site / 'models', {session.bundle.id!r}, read_public(site / 'keys')), 'cpu')\n"
        "s.warm(); assert s.probe() < 1e-4\n"
        "assert 'torch' not in sys.modules and 'onnx' not in sys.modules"
    )
    assert (done.returncode, done.stderr) == (0, "")
