"""Saliency maps against closed forms and a second library; each test has a mutation that it detects."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from learner.errors import LearnerError
from learner.explain import saliency, sanity
from learner.networks.backbone import build
from learner.networks.heads import ClassHead, DinoHead, Network
from learner.round.recipe import Recipe

torch.set_num_threads(1)  # tiny tensors: a second thread only slows them down

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def close(ours, theirs, rtol=1e-9, atol=1e-10):
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), rtol=rtol, atol=atol)


def mlp():
    """Return golden numbers, network, logit function and image (1, 4)."""
    with np.load(GOLDEN / "saliency_mlp.npz") as file:
        g = {key: torch.as_tensor(file[key]) for key in file.files}
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    names = {"0.weight": "W1", "0.bias": "b1", "2.weight": "W2", "2.bias": "b2"}
    net.load_state_dict({mine: g[theirs] for mine, theirs in names.items()})
    return g, net, of_class(net, int(g["cls"])), g["x"][None]


def of_class(net, number):
    return lambda images: net(images)[:, number]


def network(plan, pool="cls"):
    torch.manual_seed(3)
    backbone = build(plan, pool=pool)
    return Network(backbone, DinoHead(backbone.dim, 8, 8, 4), ClassHead(backbone.dim, 2, 16)).eval()


def samples(count=2, side=32):
    return torch.rand((count, 1, side, side), generator=torch.Generator().manual_seed(5))


def test_golden_gradient_and_guided():
    g, net, logit, x = mlp()
    close(logit(x)[0].detach(), g["f_x"])
    close(saliency.gradient(logit, x)[0], g["grad"])
    close(saliency.guided(net, logit, x)[0], g["guided"])


def test_golden_integral():
    g, _, logit, x = mlp()
    close(saliency.integrated(logit, x, torch.zeros_like(x), 400)[0], g["ig"])


def test_golden_smoothed_gradient_and_integral():
    g, _, logit, x = mlp()
    noise, black = g["noise"][:, None], torch.zeros_like(x)
    close(saliency.smoothed(lambda n: saliency.gradient(logit, n), x, noise)[0], g["smoothgrad"])
    made = saliency.smoothed(lambda n: saliency.integrated(logit, n, black, 400), x, noise)
    close(made[0], g["smoothgrad_ig"])


def test_guided_stops_negative_gradients_at_each_relu():
    g, net, _, x = mlp()
    on = (g["W1"] @ g["x"] + g["b1"] > 0).double()
    for number in (0, 2):
        made = saliency.guided(net, of_class(net, number), x)
        close(made[0], g["W1"].T @ (g["W2"][number].clamp(min=0) * on))
    logit = of_class(net, 0)  # for the other class all gradients behind active ReLUs are positive
    assert not torch.allclose(saliency.gradient(logit, x), saliency.guided(net, logit, x))


def test_guided_equals_the_gradient_where_all_signals_are_positive():
    _, net, _, x = mlp()
    net[2].weight.data.abs_()
    logit = of_class(net, 0)
    assert saliency.gradient(logit, x).min() < 0
    close(saliency.guided(net, logit, x), saliency.gradient(logit, x))


def test_an_integral_sums_to_the_difference_of_the_logits():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    logit, x, base = of_class(net, 0), torch.randn(3, 5).double(), torch.randn(3, 5).double()
    made = saliency.integrated(logit, x, base)
    close(made.sum(1), (logit(x) - logit(base)).detach(), rtol=1e-3)
    assert saliency.completeness(logit, x, base, made).max() < 1e-3


def test_integral_of_a_real_network_is_complete_within_the_limit():
    net, images = network({"timm": "resnet10t"}), samples(1, 64)
    for method in ("ig", "ig-blurred"):
        made, error = saliency.explain(net, Recipe(), images, 1, method)
        assert made.shape == images.shape
        assert error < saliency.COMPLETE


def test_an_incomplete_integral_is_rejected():
    kinked = lambda images: (400 * images.sum(1)).sin() + images.sum(1)  # noqa: E731 (an image that 400 steps can't follow)
    x = torch.ones(1, 3).double()
    with pytest.raises(LearnerError, match=r"off after 400 steps \(allowed 5%\)"):
        saliency.complete(kinked, x * 7.9, torch.zeros_like(x))


def test_smoothgrad_without_noise_is_the_gradient():
    _, _, logit, x = mlp()
    made = saliency.smoothed(lambda n: saliency.gradient(logit, n), x, saliency.draws(x, 4, spread=0.0))
    close(made, saliency.gradient(logit, x))


def test_noise_is_a_share_of_each_images_range_and_depends_on_the_seed_only():
    images = torch.cat([samples(1), 10 * samples(1)])
    noise = saliency.draws(images)
    assert noise.shape == (25, 2, 1, 32, 32)
    assert noise[:, 0].std().item() == pytest.approx(0.15, rel=0.05)
    assert noise[:, 1].std().item() == pytest.approx(1.5, rel=0.05)
    assert torch.equal(noise, saliency.draws(images))


def test_attention_is_that_of_the_class_token_or_the_mean_over_patches():
    images = samples()
    for pool in ("cls", "mean"):
        backbone = network(VIT, pool).backbone
        looks = backbone.attentions(images)[-1]
        row = looks[:, :, 0] if pool == "cls" else looks[:, :, 1:].mean(2)
        made = saliency.attention(backbone, images)
        assert made.shape == (2, 3, 4, 4)
        close(made.flatten(2), row[:, :, 1:].detach(), 1e-5, 1e-7)


def test_rollout_of_one_block_is_half_its_attention():
    backbone = network({**VIT, "depth": 1}).backbone
    half = 0.5 * backbone.attentions(samples())[-1].mean(1)[:, 0, 1:]
    close(saliency.rollout(backbone, samples()).flatten(1), half.detach(), 1e-5, 1e-7)


def test_rollout_multiplies_two_blocks_in_order():
    backbone = network(VIT).backbone
    first, second = (0.5 * a.mean(1) + 0.5 * torch.eye(17) for a in backbone.attentions(samples()))
    close(saliency.rollout(backbone, samples()).flatten(1), (second @ first)[:, 0, 1:].detach(), 1e-5, 1e-7)


def test_a_shown_map_is_one_from_the_99th_percentile():
    made = torch.arange(-50.0, 51.0).view(1, 1, 1, 101)
    seen = saliency.shown(made)
    assert (seen == 1).sum() == 2  # both ends
    assert seen[0, 0, 0, 50] == 0
    assert saliency.shown(made, positive=True)[0, 0, 0, :50].max() == 0


def test_rank_correlation_equals_scipy():
    first, second = torch.randn(40).double(), torch.randn(40).double()
    first[:9] = 0
    assert sanity.spearman(first, second) == pytest.approx(spearmanr(first.abs(), second.abs()).statistic)


def test_randomisation_destroys_a_map_of_the_weights():
    net, images = network(VIT, "mean"), samples(1)
    for parameter in net.parameters():
        parameter.data.mul_(3)  # unlike the weights of a reset
    correlations = sanity.cascade(net, lambda n: saliency.explain(n, Recipe(), images, 0, "gradient")[0])
    assert [name for name, _ in correlations] == [
        "class head",
        "norm",
        "blocks.1",
        "blocks.0",
        "patch_embed",
        "everything",
    ]
    assert abs(correlations[-1][1]) < 0.2


MUTATIONS = [
    ("test_golden_gradient_and_guided", "saliency.gradient",
     lambda logit, images: torch.func.grad(lambda x: logit(x).sigmoid().sum())(images)),  # of the probability
    ("test_golden_gradient_and_guided", "saliency.guided", lambda net, logit, images: images),
    ("test_golden_integral", "saliency.integrated",
     lambda logit, x, base, steps: (x - base) * slopes(logit, x, base, steps, 1.0)),  # at the end of each step
    ("test_golden_smoothed_gradient_and_integral", "saliency.smoothed",
     lambda explain, images, noise: explain(images + noise.mean(0))),
    ("test_guided_stops_negative_gradients_at_each_relu", "saliency.guided",
     lambda net, logit, images: saliency.gradient(logit, images)),
    ("test_guided_equals_the_gradient_where_all_signals_are_positive", "saliency.guided",
     lambda net, logit, images: saliency.gradient(logit, images).clamp(min=0)),
    ("test_an_integral_sums_to_the_difference_of_the_logits", "saliency.integrated",
     lambda logit, x, base: x * slopes(logit, x, base, 50, 0.5)),  # as if every baseline were zero
    ("test_integral_of_a_real_network_is_complete_within_the_limit", "saliency.integrated",
     lambda logit, x, base, steps: saliency.gradient(logit, (x + base) / 2)),
    ("test_smoothgrad_without_noise_is_the_gradient", "saliency.smoothed",
     lambda explain, images, noise: torch.stack([explain(images + n) for n in noise]).square().mean(0)),
    ("test_noise_is_a_share_of_each_images_range_and_depends_on_the_seed_only", "saliency.draws",
     lambda images: 0.15 * torch.randn(25, *images.shape)),
    ("test_attention_is_that_of_the_class_token_or_the_mean_over_patches", "saliency.attention",
     lambda backbone, images: backbone.attentions(images)[-1][:, :, 0, 1:].unflatten(-1, (4, 4))),
    ("test_rollout_of_one_block_is_half_its_attention", "saliency.rollout",
     lambda backbone, images: backbone.attentions(images)[-1].mean(1)[:, 0, 1:]),
    ("test_rollout_multiplies_two_blocks_in_order", "saliency.rollout",
     lambda backbone, images: saliency.attention(backbone, images).mean(1) / 2),
    ("test_a_shown_map_is_one_from_the_99th_percentile", "saliency.shown",
     lambda made, positive=False: made / 50),
    ("test_rank_correlation_equals_scipy", "sanity.midranks", np.argsort),
    ("test_randomisation_destroys_a_map_of_the_weights", "sanity.reset", lambda part: None),
]  # fmt: skip


def slopes(logit, x, base, steps, place):
    return torch.stack([saliency.gradient(logit, base + (k + place) / steps * (x - base)) for k in range(steps)]).mean(
        0
    )


@pytest.mark.parametrize(("test", "attribute", "wrong"), MUTATIONS)
def test_every_property_notices_its_mutation(monkeypatch, test, attribute, wrong):
    monkeypatch.setattr(f"learner.explain.{attribute}", wrong)
    with pytest.raises((AssertionError, LearnerError)):
        globals()[test]()


def test_a_map_that_ignores_the_weights_survives_randomisation():
    images = samples(1)
    correlations = sanity.cascade(network(VIT), lambda _: images - saliency.blurred(images, 2.0))
    assert correlations[-1][1] == pytest.approx(1.0)


def test_reset_changes_every_weight():
    net = network(VIT)
    before = {key: value.clone() for key, value in net.backbone.state_dict().items() if "bias" not in key}
    for value in net.backbone.parameters():
        value.data.add_(0.3)
    sanity.reset(net.backbone)
    shifted = [key for key, value in net.backbone.state_dict().items() if key in before and value.mean() > 0.25]
    assert all("norm" in key for key in shifted)  # a reset LayerNorm has weight 1


def test_guided_works_with_in_place_relu_and_removes_its_hooks():
    net, images = network({"timm": "resnet10t"}), samples(1, 64)
    plain, _ = saliency.explain(net, Recipe(), images, 0, "gradient")
    made, _ = saliency.explain(net, Recipe(), images, 0, "guided")
    assert not torch.allclose(made, plain)
    assert torch.equal(saliency.explain(net, Recipe(), images, 0, "gradient")[0], plain)


@pytest.mark.parametrize(
    ("plan", "bend"), [(VIT, "GELU"), ({"timm": "mobilenetv3_small_050"}, "Hardsigmoid, Hardswish")]
)
def test_guided_is_rejected_with_other_activations(plan, bend):
    with pytest.raises(LearnerError, match=f"this network has {bend}"):
        saliency.explain(network(plan), Recipe(), samples(), 0, "guided")


@pytest.mark.parametrize("method", ["attention", "rollout"])
def test_attention_of_a_convolutional_network_is_rejected(method):
    with pytest.raises(LearnerError, match="has no attention"):
        saliency.explain(network({"timm": "resnet10t"}), Recipe(), samples(1, 64), 0, method)


@pytest.mark.parametrize("method", saliency.METHODS)
def test_every_other_method_works_on_a_transformer(method):
    if method == "guided":
        return
    made, error = saliency.explain(network(VIT), Recipe(), samples(1), 1, method)
    assert made.shape == {"heatmap": (1, 1, 4, 4), "rollout": (1, 1, 4, 4), "attention": (1, 3, 4, 4)}.get(method, (1, 1, 32, 32))  # fmt: skip
    assert torch.isfinite(made).all()
    assert (error is not None) == method.startswith("ig")
