"""What a backbone is, and its download: timm names and repositories over a real socket, local files, and every error."""

import json

import huggingface_hub
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from learner.networks.backbone import build
from learner.pretrained import check
from learner.pretrained.reader import read_pretrained
from tests.support.learner import backbone_files
from tests.support.learner.hub_server import hub

torch.set_num_threads(1)  # tiny tensors: a second thread only slows them down


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """A function that runs the check with the hub at an address (by default nobody answers); it returns code, document, error."""

    def run(*words, address="http://127.0.0.1:9"):
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home"))
        code = check.main([str(word) for word in words])
        out, error = capsys.readouterr()
        return code, json.loads(out) if out else None, error

    return run


def saved(path, weights):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous().clone() for key, value in weights.items()}, path)
    return path


def document(answer):
    code, made, error = answer
    assert code == 0, error
    return made


def test_fetch_by_a_timm_name_writes_a_whole_file_with_what_timm_knows(ask, tmp_path):
    net = timm.create_model("test_vit").eval()
    saved(tmp_path / "hub/timm/test_vit.r160_in1k/model.safetensors", net.state_dict())
    out = tmp_path / "vit.safetensors"
    with hub(tmp_path / "hub", {"timm/test_vit.r160_in1k": {"license": "apache-2.0"}}) as (address, requests):
        made = document(ask("test_vit", "--out", out, address=address))
        known = document(ask("timm/test_vit", address=address))
    assert any(
        request.startswith("GET /timm/test_vit.r160_in1k/resolve/main/model.safetensors") for request in requests
    )
    assert (made["family"], made["arch"], made["image_size"]) == ("timm network", "test_vit.r160_in1k", 160)
    assert (made["licence"], made["mean"]) == ("apache-2.0", [0.5, 0.5, 0.5])
    assert made["source"] == "timm/test_vit.r160_in1k/model.safetensors"
    assert (made["unused"], made["missing"], made["set_aside"]) == ([], [], [])
    assert known["set_aside"] == ["head.bias", "head.weight"]  # of what was downloaded
    assert made == document(ask(out))
    read = read_pretrained(out)
    ours, images = build(read.plan, "timm").eval(), torch.rand(1, 3, 160, 160)
    ours.load(read.tensors)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), net.forward_features(images)[:, 0], rtol=1e-5, atol=1e-5)


def test_fetch_from_a_repository_takes_its_preprocessing_and_its_licence(ask, tmp_path):
    folder = tmp_path / "hub/hospital/rad-dino"
    folder.mkdir(parents=True)
    backbone_files.hugging_face(folder)
    config = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "crop_size": {"height": 64, "width": 64}}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    out, card = tmp_path / "rad.safetensors", {"license": "other", "license_name": "msrla"}
    with hub(tmp_path / "hub", {"hospital/rad-dino": card}) as (address, _):
        made = document(ask("hospital/rad-dino", "--out", out, address=address))
    assert (made["family"], made["licence"], made["image_size"]) == ("Hugging Face Dinov2", "msrla", 64)
    assert (made["mean"], made["std"]) == (config["image_mean"], config["image_std"])
    assert not any(key.startswith("embeddings") for key in load_file(out))


def test_fetch_of_eva_x_converts_the_pickle_and_states_what_its_publisher_states(ask, tmp_path):
    folder = tmp_path / "hub/MapleF/eva_x"
    folder.mkdir(parents=True)
    torch.save({"module": backbone_files.eva_x()[0]}, folder / "eva_x_small.pt")
    out = tmp_path / "eva.safetensors"
    with hub(tmp_path / "hub", {"MapleF/eva_x": {}}) as (address, _):
        name = "MapleF/eva_x/eva_x_small.pt"
        made = document(ask(name, "--out", out, address=address))
    assert (made["family"], made["licence"], made["mean"]) == ("EVA-02 (also EVA-X)", "mit", [0.49185243])
    assert (made["source"], made["missing"]) == (name, [])


def test_fetch_converts_a_local_pickle(ask, tmp_path):
    torch.save({"model": backbone_files.mae()[0]}, tmp_path / "mae.pth")
    out = tmp_path / "mae.safetensors"
    made = document(ask(tmp_path / "mae.pth", "--out", out))
    assert (made["family"], made["set_aside"]) == ("MAE (also MedMAE)", [])
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["num_heads"] == "2"


@pytest.mark.parametrize(
    ("name", "out", "says"),
    [
        ("test_vit", "w.safetensors", "the hub can't be reached"),
        ("test_vit", "w.bin", "must end with .safetensors"),
        ("test_vit", "there.safetensors", "exists; give another name"),
        ("test_vit", "no/folder/w.safetensors", "no folder"),
        ("test_coatnet", "w.safetensors", "timm has no weights of this model"),
    ],
)
def test_what_cannot_be_fetched_is_one_line_and_writes_nothing(ask, tmp_path, name, out, says):
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    before = sorted(path.name for path in tmp_path.iterdir())
    code, made, error = ask(name, "--out", tmp_path / out)
    assert (code, made, error.count("\n")) == (1, None, 1)
    assert says in error
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == before
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"


def test_a_file_that_the_hub_lacks_is_named(ask, tmp_path):
    with hub(tmp_path, {"a/b": {}}) as (address, _):
        for name, file in (("a/b", "a/b/model.safetensors"), ("x/y", "x/y/model.safetensors")):
            code, _, error = ask(name, address=address)
            assert (code, f"the hub has no {file}" in error) == (1, True), error


def test_unused_tensors_of_a_download_are_named_and_nothing_is_written(ask, tmp_path):
    net = timm.create_model("test_vit").state_dict() | {"adapter.weight": torch.zeros(2)}
    saved(tmp_path / "hub/timm/test_vit.r160_in1k/model.safetensors", net)
    with hub(tmp_path / "hub", {"timm/test_vit.r160_in1k": {}}) as (address, _):
        code, _, error = ask("test_vit", "--out", tmp_path / "w.safetensors", address=address)
    assert (code, (tmp_path / "w.safetensors").exists()) == (1, False)
    assert "1 tensors unused: adapter.weight" in error


@pytest.mark.parametrize("name", ["nowhere.safetensors", "vit_enormous", "damaged.safetensors"])
def test_what_cannot_be_read_is_one_line(ask, tmp_path, name):
    (tmp_path / "damaged.safetensors").write_bytes(b"<html>")
    code, made, error = ask(tmp_path / name if "." in name else name)
    assert (code, made, error.count("\n")) == (1, None, 1)
    assert name in error


def test_the_hash_is_that_of_the_tensors_not_of_names_of_files_or_metadata(ask, tmp_path):
    weights, _ = backbone_files.timm_vit()
    backwards = dict(reversed(weights.items()))
    save_file(backwards, tmp_path / "copy.safetensors", {"licence": "mit"})
    first = document(ask(saved(tmp_path / "w.safetensors", weights)))["sha256"]
    assert document(ask(tmp_path / "copy.safetensors"))["sha256"] == first
    torch.save(weights, tmp_path / "w.pth")
    assert document(ask(tmp_path / "w.pth"))["sha256"] == first
    for changed in ({"norm.bias": weights["norm.bias"] + 1}, {"norm.bias": weights["norm.bias"].half()}):
        assert document(ask(saved(tmp_path / "w2.safetensors", weights | changed)))["sha256"] != first
