"""Convolutional networks as encoders: by name, from a file, at any size, and a whole round."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import save_file

from learner.engine.checkpoint import read_file
from learner.errors import LearnerError
from learner.networks import convnet
from learner.networks.architecture import plan_of
from learner.networks.backbone import build, fit_sizes, resized
from learner.networks.heads import ClassHead, make_network
from learner.networks.mimetic_init import mimic_trained
from learner.pretrained.reader import open_backbone, read_pretrained
from learner.round.recipe import resolve
from tests.support.learner.round_folders import card, make_round, result

torch.set_num_threads(1)  # tiny tensors: a second thread only slows them down

ROOT = Path(__file__).resolve().parents[3]
WIDTHS = {
    "resnet50": 2048, "densenet121": 1024, "vgg19_bn": 512, "mobilenetv3_large_100": 960, "mobilenetv2_100": 1280,
}  # fmt: skip


def small(name="resnet10t"):
    torch.manual_seed(0)
    return build(plan_of(name, 64))


@pytest.mark.parametrize("name", WIDTHS)
def test_embedding_is_the_mean_of_the_last_feature_map_at_any_size(name):
    net = small(name).eval()
    assert (net.dim, net.patch) == (WIDTHS[name], 32)
    with torch.no_grad():
        for side in (64, 96):
            images = torch.rand(2, 1, side, side)
            theirs = net.net.forward_features(images.expand(-1, 3, -1, -1)).mean((2, 3))
            torch.testing.assert_close(net(images), theirs)
            torch.testing.assert_close(net(images.expand(-1, 3, -1, -1)), theirs)


def test_unused_classifier_layers_are_removed():
    whole = timm.create_model("vgg19_bn", num_classes=0)
    assert sum(p.numel() for p in whole.parameters()) > 1e8
    assert sum(p.numel() for p in small("vgg19_bn").parameters()) < 2.1e7


def test_the_copy_for_the_export_does_not_change_the_trained_network():
    plan = plan_of("resnet10t", 64)
    trained = small().train()
    copy = resized(trained, plan, 96).eval()
    assert trained.training
    images = torch.rand(2, 1, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(copy(images), trained.eval()(images))
    next(copy.parameters()).data.zero_()
    assert next(trained.parameters()).abs().sum() > 0


def test_contributions_of_positions_sum_to_the_logit():
    net, head = small().double().eval(), ClassHead(512, 2, 16).double()
    embedding, trace = net.trace(torch.rand(2, 1, 96, 64).double())
    slope = head.gradient(embedding)
    maps = trace.contributions(slope)
    assert maps.shape == (2, 2, 3, 2)
    torch.testing.assert_close(maps.flatten(2).sum(-1), (slope * embedding[:, None]).sum(-1))


def test_every_property_notices_its_mutation(monkeypatch):
    kept = convnet.ConvTrace.contributions
    monkeypatch.setattr(convnet.ConvTrace, "contributions", lambda self, directions: kept(self, directions).abs())
    with pytest.raises(AssertionError):
        test_contributions_of_positions_sum_to_the_logit()


def test_the_error_for_attention_names_the_network():
    with pytest.raises(LearnerError, match="resnet10t is a convolutional network and has no attention"):
        small().attentions(torch.rand(1, 1, 64, 64))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "mixer_s16_224"])
def test_networks_of_other_kinds_are_rejected(name):
    with pytest.raises(LearnerError, match="or a convolutional network that takes any image size"):
        build(plan_of(name, 64))


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_distilled_patch16_224",  # a second class token
        "vit_small_patch16_18x2_224",  # two attentions in a block
        "beit3_base_patch16_224",  # no norm after the last block
    ],
)
def test_transformers_that_are_not_plain_are_rejected(name):
    with torch.device("meta"), pytest.raises(LearnerError, match="needs a plain vision transformer"):  # no weights
        build(plan_of(name, 64))


def test_a_convnet_ignores_the_settings_of_transformers():
    torch.manual_seed(1)
    plain = build({"timm": "resnet10t"})
    torch.manual_seed(1)
    configured = build({"timm": "resnet10t"}, pos_embed="timm", pool="cls", drop_path=0.5)
    mimic_trained(configured)
    assert configured.pool == "mean"
    for mine, theirs in zip(plain.parameters(), configured.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_image_sides_are_rounded_to_the_stride():
    with pytest.warns(UserWarning, match="local 48 -> 64 px"):
        recipe = fit_sizes(resolve("distl", "cpu"), small())
    assert (recipe.image_size, recipe.local_size) == (96, 64)


def test_the_metadata_of_a_file_names_its_network(tmp_path):
    net = timm.create_model("resnet10t", num_classes=5).eval()
    weights = {f"module.{key}": value for key, value in net.state_dict().items()}
    save_file(weights, tmp_path / "w.safetensors", metadata={"timm": "resnet10t"})
    read = read_pretrained(tmp_path / "w.safetensors").require_whole("w")
    again = build(read.plan).eval()
    again.load(read.tensors)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(images), net.forward_features(images).mean((2, 3)))


def test_a_file_without_metadata_needs_the_timm_name(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file(timm.create_model("resnet10t", num_classes=0).state_dict(), file)
    with pytest.raises(LearnerError, match='set the timm name, such as arch = "densenet121"'):
        read_pretrained(file, "vit_tiny_patch16").require_whole("w")
    opened = open_backbone(resolve("distl", "demo", {"backbone": str(file), "arch": "resnet10t"}))
    assert opened.plan == {"timm": "resnet10t"}
    with pytest.raises(LearnerError, match="of another shape"):
        read_pretrained(file, "resnet50").require_whole("w")


def test_the_error_without_hub_names_the_option_for_a_file(tmp_path):
    code = (
        "from learner.round.recipe import resolve; from learner.pretrained.reader import open_backbone; from learner.errors import LearnerError\n"
        "try: open_backbone(resolve('distl', 'demo', {'backbone': 'resnet50.a1_in1k'}))\n"
        "except LearnerError as error: print(error)"
    )
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=offline, check=True)
    assert "the hub can't be reached" in out.stdout
    assert "--backbone FILE" in out.stdout


def test_a_network_without_prototypes_returns_the_embedding():
    recipe = resolve("distl", "demo")
    object.__setattr__(recipe, "prototypes", 0)
    network = make_network({"timm": "resnet10t"}, recipe, 2).eval()
    assert not any(name.startswith("head.") for name in network.state_dict())
    with torch.no_grad():
        prototypes, logits = network([torch.rand(3, 1, 64, 64)] * 2)
    assert prototypes.shape == (6, 512)
    assert logits.shape == (6, 2)


def test_a_whole_round_with_a_convolutional_network(tmp_path):
    arch = "mobilenetv3_small_050"  # squeeze-and-excite and hard swish are hard to export
    folder = make_round(tmp_path / "r", arch=arch, image_size=64, local_size=32, init="mimetic")
    command = [sys.executable, "-m", "learner", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert result(folder)["state"] == "trained"
    assert max(card(folder)["parity"]["1"], card(folder)["parity"]["8"]) <= 1e-3
    assert read_file(folder / "final/state.safetensors")[1]["plan"] == {"timm": arch}
    session = onnxruntime.InferenceSession(folder / "final/model.onnx", providers=["CPUExecutionProvider"])
    with np.load(folder / "final/probe.npz") as probe:
        logits, embedding, heat = session.run(["logits", "embedding", "heatmap"], {"plates": probe["plates"][:3]})
    assert np.isfinite(logits).all()
    assert heat.shape == (3, 2, 2, 2)
    assert embedding.shape[0] == 3
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["phase"] for row in rows} == {"t0", "distil"}
