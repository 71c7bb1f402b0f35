"""The commands `backbone check` and `backbone fetch`: document, words, exit codes; see also tests/learner/pretrained/test_check.py."""

import json
import os
import subprocess
import sys

import torch
from safetensors.torch import save_file

from tests.support.learner import backbone_files
from tests.support.learner.hub_server import hub

KEYS = {
    "family", "arch", "matched", "set_aside", "unused", "missing", "image_size", "mean", "std", "licence", "sha256", "source",
}  # fmt: skip


def run(*words, home, address="http://127.0.0.1:9", **more):
    """Run `cxrloop backbone`; by default the hub's address answers nobody."""
    environment = os.environ | {"HF_HOME": str(home), "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"} | more
    command = [sys.executable, "-m", "agent.cli.main", "backbone", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def saved(path, weights, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous().clone() for key, value in weights.items()}, path, metadata or None)
    return path


def document(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_check_says_what_a_file_is(tmp_path):
    weights, _ = backbone_files.dinov2_with_registers()
    path = saved(tmp_path / "w.safetensors", weights, licence="apache-2.0", mean="[0.485, 0.456, 0.406]")
    made = document(run("check", path, "--json", home=tmp_path))
    assert set(made) == KEYS
    assert made["family"] == "DINOv2 with registers"
    assert (made["arch"], made["image_size"]) == ("vit_128wide_patch16_depth2_reg3", 64)
    assert set(made["matched"]) == set(weights) - {"mask_token"}
    assert (made["set_aside"], made["unused"], made["missing"]) == (["mask_token"], [], [])
    assert (made["mean"], made["std"], made["licence"]) == ([0.485, 0.456, 0.406], None, "apache-2.0")
    assert len(bytes.fromhex(made["sha256"])) == 32


def test_check_in_words_names_what_is_set_aside_and_what_is_not_stated(tmp_path):
    weights, _ = backbone_files.mae()
    matched = [key for key in weights if not key.startswith(("decoder_", "mask_token"))]
    done = run("check", saved(tmp_path / "w.safetensors", weights), home=tmp_path)
    assert done.returncode == 0
    assert "MAE (also MedMAE)" in done.stdout
    assert f"{len(matched)} matched, 0 unused, 0 missing" in done.stdout
    assert "decoder_embed.weight" in done.stdout
    assert "not stated; ask its publisher" in done.stdout


def test_unused_and_missing_tensors_are_exit_1_with_their_names(tmp_path):
    weights, _ = backbone_files.timm_vit()
    del weights["norm.bias"]
    path = saved(tmp_path / "w.safetensors", weights | {"register_tokens": torch.zeros(1, 4, 128)})
    done = run("check", path, "--json", home=tmp_path)
    made = json.loads(done.stdout)
    assert (done.returncode, made["unused"], made["missing"]) == (1, ["register_tokens"], ["norm.bias"])
    assert "1 tensors unused: register_tokens; 1 tensors missing or of another shape: norm.bias" in done.stderr


def test_what_cannot_be_read_is_one_line_and_exit_1(tmp_path):
    done = run("check", "vit_enormous", "--json", home=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith('error: backbone = "vit_enormous": no such file and no timm model of that name')
    assert done.stderr.count("\n") == 1


def test_without_torch_the_error_names_the_extra(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from agent.cli.main import main; sys.argv = ['cxrloop', 'backbone', 'check', 'x.safetensors']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1, "error: backbone: torch is not installed; run: pip install 'cxrloop[train]'\n"
    )  # fmt: skip


def test_fetch_downloads_from_the_hub_and_shows_the_new_file(tmp_path):
    folder = tmp_path / "hub/MapleF/eva_x"
    folder.mkdir(parents=True)
    torch.save({"module": backbone_files.eva_x()[0]}, folder / "eva_x_small.pt")
    name, out = "MapleF/eva_x/eva_x_small.pt", tmp_path / "eva.safetensors"
    with hub(tmp_path / "hub", {"MapleF/eva_x": {}}) as (address, requests):
        made = document(run("fetch", name, "--out", out, "--json", home=tmp_path / "home", address=address))
    assert requests
    assert set(made) == KEYS
    assert (made["family"], made["source"], made["licence"]) == ("EVA-02 (also EVA-X)", name, "mit")
    assert out.is_file()
