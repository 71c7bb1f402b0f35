"""`cxrloop explain` as a person runs it, on a site whose model was trained there."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from agent.demo import pacs
from agent.errors import Problem
from agent.images.importer import import_folder
from agent.results import attribution, explain
from learner.engine.checkpoint import write_file
from learner.explain import saliency
from learner.networks.heads import make_network
from learner.round.recipe import resolve
from tests.conftest import make_site
from tests.support.agent.appliance import TINY, Appliance
from tests.support.agent.models import add_model
from tests.support.learner.round_folders import xray

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def trained_site(tmp_path_factory):
    """(commands, images) of a site with a baseline that was trained on these images."""
    folder = tmp_path_factory.mktemp("trained_site")
    site = make_site(folder / "site", learn={"recipe": "tiny.toml", "window": ""})
    (site.root / "tiny.toml").write_text(TINY)
    images, _ = pacs.phantoms(folder / "pacs", 40, 8)
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("sop_uid", "finding", "value"))
        rows.writerows((image.sop_uid, name, value) for image in images for name, value in image.truth.items())
    appliance = Appliance(site)
    assert appliance.ask("import", str(folder / "pacs"))["stored"] == 40
    appliance.ask("labels", "import", str(folder / "labels.csv"))
    appliance.ask("round", "run", "--now")
    return appliance, images


@pytest.mark.parametrize("method", ["heatmap", "ig", "smoothgrad"])
def test_a_map_of_the_served_model_is_drawn_over_the_image(trained_site, method):
    appliance, images = trained_site
    picture = appliance.site.root / f"{method}.png"
    answer = appliance.ask(
        "explain", images[0].sop_uid, "--finding", "effusion", "--method", method, "-o", str(picture)
    )
    assert {"bundle", "probability", "threshold", "method", "image"} <= set(answer)
    assert (answer["method"], answer["finding"], answer["image"]) == (method, "effusion", str(picture))
    assert Image.open(picture).size == (512, 512)
    assert ("completeness" in answer) == (method != "heatmap")
    if method == "ig":
        assert answer["completeness"] < 0.05
    plain = appliance.ask("explain", images[0].sop_uid, "--finding", "effusion")
    assert plain == {key: plain[key] if key in ("method", "image") else answer[key] for key in plain}


def test_attention_has_a_panel_for_each_head(trained_site):
    appliance, images = trained_site
    picture = appliance.site.root / "attention.png"
    appliance.ask("explain", images[1].sop_uid, "--method", "attention", "-o", str(picture))
    assert Image.open(picture).size == (1024, 1024)  # three heads in a sheet of two by two
    sheet = np.asarray(Image.open(picture)).astype(int)
    assert sheet[512:, 512:].max() == 0
    assert (sheet[:512, :512] != sheet[:512, 512:]).any()


def test_with_positive_only_evidence_for_the_finding_is_drawn(trained_site):
    appliance, images = trained_site
    pictures = []
    for words in ((), ("--positive",)):
        picture = appliance.site.root / f"map{len(words)}.png"
        appliance.ask("explain", images[2].sop_uid, "--method", "gradient", *words, "-o", str(picture))
        pictures.append(np.asarray(Image.open(picture)))
    assert (pictures[0] != pictures[1]).any()


def test_as_of_uses_the_model_in_service_at_that_time(trained_site):
    appliance, images = trained_site
    words = ("explain", images[0].sop_uid, "--method", "rollout")
    now = appliance.ask(*words, "--as-of", "2099-01-01T00:00:00")
    assert now["bundle"] == appliance.ask(*words)["bundle"]
    assert "no model was in service then" in appliance.ask(*words, "--as-of", "2001-01-01T00:00:00", code=1)


def test_a_map_that_can_not_be_computed_is_reported_in_one_line(trained_site):
    appliance, images = trained_site
    answer = appliance.ask("explain", images[0].sop_uid, "--method", "guided", code=1)
    assert "this network has GELU" in answer
    assert "Traceback" not in answer
    answer = appliance.ask("explain", images[0].sop_uid, "--method", "gradcam", code=1)
    assert "must be one of heatmap, gradient, guided" in answer


def test_weights_other_than_the_served_ones_are_not_explained(trained_site):
    """The training state holds the weights of another network, so its probability differs."""
    appliance, images = trained_site
    state = next((appliance.site.rounds / "r0001" / "t0").glob("state.safetensors"))
    kept = state.read_bytes()
    try:
        network, recipe, findings = saliency.open_state(state)
        header = {"plan": saliency.read_file(state)[1]["plan"], "findings": findings, "recipe": recipe.to_dict()}
        network.cls_head.mlp[4].bias.data += 5
        write_file(state, {f"{recipe.serve}.{key}": value for key, value in network.state_dict().items()}, header)
        assert "not the same weights" in appliance.ask("explain", images[0].sop_uid, "--method", "gradient", code=1)
        state.unlink()
        assert "restore it from the backup" in appliance.ask("explain", images[0].sop_uid, "--method", "ig", code=1)
    finally:
        state.write_bytes(kept)


def test_an_imported_model_has_only_the_heatmap(site, tmp_path):
    pacs.phantoms(tmp_path / "pacs", 1, 3)
    with site.ledger() as ledger:
        import_folder(site, ledger, tmp_path / "pacs", "PA")
        add_model(site, ledger, 1)
        assert explain.explain(site, ledger, "1", None, "heatmap", None, None)["image"] is None
        with pytest.raises(
            Problem, match=r"has no training state \(imported, or removed by retention.rounds\); use --method heatmap"
        ):
            explain.explain(site, ledger, "1", None, "ig", None, None)


def test_an_install_without_torch_names_the_extra(site, tmp_path, monkeypatch):
    pacs.phantoms(tmp_path / "pacs", 1, 3)
    with site.ledger() as ledger:
        import_folder(site, ledger, tmp_path / "pacs", "PA")
        add_model(site, ledger, 1)
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(Problem, match=r"pip install 'cxrloop\[train\]'"):
            explain.explain(site, ledger, "1", None, "gradient", None, None)


def test_agent_and_learner_offer_the_same_methods():
    assert explain.METHODS == saliency.METHODS
    assert set(attribution.METHODS) < set(saliency.METHODS)


def child(folder, state, method):
    words = [
        str(state),
        str(folder / "plate.npy"),
        "--finding",
        "mass",
        "--method",
        method,
        "--out",
        str(folder / "o.npy"),
    ]
    return subprocess.run(
        [sys.executable, "-m", "learner.explain.saliency", *words], cwd=ROOT, capture_output=True, text=True
    )  # fmt: skip


def test_a_convolutional_net_has_a_guided_map_and_no_attention_map(tmp_path):
    recipe = resolve("distl", "demo", {"arch": "resnet10t", "image_size": 64, "local_size": 32, "prototypes": 8})
    torch.manual_seed(0)
    network, header = make_network({"timm": "resnet10t"}, recipe, 2), {"plan": {"timm": "resnet10t"}}
    header |= {"findings": ["effusion", "mass"], "recipe": recipe.to_dict()}
    write_file(tmp_path / "s", {f"student.{key}": value for key, value in network.state_dict().items()}, header)
    np.save(tmp_path / "plate.npy", xray((0, 1), 4))
    done = child(tmp_path, tmp_path / "s", "guided")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["completeness"] is None
    made = np.load(tmp_path / "o.npy")
    assert made.shape == (1, 64, 64)
    assert 0 <= made.min() < made.max() == 1
    done = child(tmp_path, tmp_path / "s", "attention")
    assert done.returncode == 1
    assert "resnet10t is a convolutional network and has no attention" in done.stderr
    (tmp_path / "broken").write_bytes(b"no tensors")
    assert "not the state of a trained round" in child(tmp_path, tmp_path / "broken", "ig").stderr
