"""Saliency maps of one finding's logit (not of its probability) over an image.

`python -m learner.explain.saliency STATE PLATE --finding F --method M --out MAP` writes a map, on the CPU. Raises
LearnerError for a method that is not defined for the network, and for integrated gradients that are not complete.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cxrloop.plate import PLATE_SHAPE
from learner.data.augment import blur, normalise, to_image
from learner.data.plates import read_plate
from learner.engine.checkpoint import load_network, read_file
from learner.errors import LearnerError
from learner.networks.backbone import Backbone
from learner.networks.convnet import ConvNet
from learner.networks.heads import Network, make_network
from learner.networks.pooling import resize_matrix
from learner.round.recipe import Recipe

METHODS = (
    "heatmap", "gradient", "guided", "ig", "ig-blurred", "smoothgrad", "smoothgrad-ig", "attention", "rollout",
)  # fmt: skip
STEPS = 50  # of an integral, as Ho & Gwak, IEEE Access 2020
MOST_STEPS = 400  # the steps are doubled up to this number until the integral is complete
COMPLETE = 0.05  # largest completeness error, as a share of the difference of the logits
BLUR = 10.0  # sigma, in pixels of the network's image
DRAWS, SPREAD = 25, 0.15  # SmoothGrad: number of noisy copies; standard deviation as a share of the image's range
DRAWS_IG = 10  # of smoothgrad-ig, where each copy needs an integral
CLIP = 0.99  # quantile of a map shown at full strength, so that single pixels do not hide the others

Logit = Callable[[Tensor], Tensor]  # images (B, ...) -> one finding's logit (B,)


def gradient(logit: Logit, images: Tensor) -> Tensor:
    """Return d logit / d image, of the images' shape (B, ...)."""
    images = images.detach().requires_grad_()
    return torch.autograd.grad(logit(images).sum(), images)[0]


def guided(network: nn.Module, logit: Logit, images: Tensor) -> Tensor:
    """Return guided backpropagation (Springenberg et al., ICLR workshop 2015): each ReLU passes R 1[R > 0] 1[f > 0] back.

    Raises LearnerError where the network has activations other than ReLU, or none.
    """
    with _guided_relu(network):
        return gradient(logit, images)


@contextmanager
def _guided_relu(network: nn.Module) -> Iterator[None]:
    """Let each ReLU of the network pass only positive gradients back."""
    activations = [module for module in network.modules() if ".activation" in type(module).__module__]
    others = sorted({type(module).__name__ for module in activations if not isinstance(module, (nn.ReLU, nn.ReLU6))})
    if others or not activations:
        raise LearnerError(
            f"this network has {', '.join(others) or 'no ReLU'}, and guided backpropagation is defined for ReLU "
            "only (resnet, densenet, vgg); use gradient, ig or smoothgrad"
        )

    def positive_only(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda grad: grad.clamp(min=0))

    hooks = [module.register_forward_hook(positive_only) for module in activations]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def integrated(logit: Logit, images: Tensor, baseline: Tensor, steps: int = STEPS) -> Tensor:
    """Return integrated gradients (Sundararajan et al., ICML 2017, Eq. 1) by the midpoint rule, of the images' shape."""
    total = torch.zeros_like(images)
    for step in range(steps):
        total += gradient(logit, baseline + (step + 0.5) / steps * (images - baseline))
    return (images - baseline) * total / steps


def completeness(logit: Logit, images: Tensor, baseline: Tensor, maps: Tensor) -> Tensor:
    """Return |sum of the map - (S(x) - S(b))| / |S(x) - S(b)|, (B,), S = logit; 0 for an exact integral."""
    with torch.no_grad():
        difference = logit(images) - logit(baseline)
    return (maps.flatten(1).sum(1) - difference).abs() / difference.abs()


def complete(logit: Logit, images: Tensor, baseline: Tensor) -> tuple[Tensor, float]:
    """Return integrated gradients with enough steps to be complete, and the largest completeness error.

    Raises LearnerError where the error is not below COMPLETE with MOST_STEPS.
    """
    steps, error = STEPS, float("inf")
    while steps <= MOST_STEPS:
        maps = integrated(logit, images, baseline, steps)
        error = float(completeness(logit, images, baseline, maps).max())
        if error < COMPLETE:
            return maps, error
        steps *= 2
    raise LearnerError(
        f"integrated gradients: the sum is {error:.0%} off after {MOST_STEPS} steps (allowed {COMPLETE:.0%}): "
        "image and baseline have similar logits, or the gradient varies too much; use another baseline or smoothgrad"
    )


def smoothed(explain: Callable[[Tensor], Tensor], images: Tensor, noise: Tensor) -> Tensor:
    """Return SmoothGrad (Smilkov et al. 2017): the mean of `explain(images + n)` over the rows n of `noise` (N, B, ...)."""
    return torch.stack([explain(images + row) for row in noise]).mean(0)


def draws(images: Tensor, count: int = DRAWS, spread: float = SPREAD, seed: int = 0) -> Tensor:
    """Return Gaussian noise (N, B, ...) with standard deviation `spread` x (max - min) of each image, from the seed."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn((count, *images.shape), generator=generator, dtype=images.dtype).to(images.device)
    flat = images.flatten(1)
    return plain * (spread * (flat.amax(1) - flat.amin(1))).view(-1, *[1] * (images.ndim - 1))


@torch.no_grad()
def attention(backbone: Backbone | ConvNet, images: Tensor) -> Tensor:
    """Return the attention of the embedding in the last block, for each head: (B, heads, h, w); the same for all findings."""
    return _of_patches(backbone, backbone.attentions(images)[-1], images)


@torch.no_grad()
def rollout(backbone: Backbone | ConvNet, images: Tensor) -> Tensor:
    """Return attention rollout, half of it through the residual (Abnar & Zuidema, ACL 2020): (B, 1, h, w)."""
    attentions = backbone.attentions(images)
    through = torch.eye(attentions[0].shape[-1], dtype=images.dtype, device=images.device)
    for block in attentions:
        through = (0.5 * block.mean(1) + 0.5 * torch.eye(block.shape[-1]).to(block)) @ through
    return _of_patches(backbone, through[:, None], images)


def _of_patches(backbone: Backbone | ConvNet, attentions: Tensor, images: Tensor) -> Tensor:
    """Return attention (B, heads, h, w) of the class token, or the mean over patches for pool "mean", to the patches."""
    prefix = cast(Backbone, backbone).vit.num_prefix_tokens
    rows = attentions[:, :, prefix:].mean(2) if backbone.pool == "mean" else attentions[:, :, 0]
    high, wide = (side // backbone.patch for side in images.shape[-2:])
    return rows[:, :, prefix:].unflatten(-1, (high, wide))


def explain(network: Network, recipe: Recipe, images: Tensor, finding: int, method: str) -> tuple[Tensor, float | None]:
    """Return the signed map of one finding by a method of METHODS, and the completeness error (None without an integral).

    images: (B, 1, S, S) in [0, 1] of `to_image`, so that the baseline 0 is a black image; network: in eval mode. The map is
    (B, 1, S, S) over pixels, (B, 1, h, w) over patches for heatmap and rollout, (B, heads, h, w) for attention. Raises
    LearnerError for a method that the network does not have.
    """
    inputs = normalise(images, recipe)

    def logit(images: Tensor) -> Tensor:
        return network.classify(normalise(images, recipe))[:, finding]

    match method:
        case "heatmap":
            with torch.no_grad():
                embedding, trace = network.backbone.trace(inputs)
                return trace.contributions(network.cls_head.gradient(embedding)[:, finding : finding + 1]), None
        case "gradient":
            return gradient(logit, images), None
        case "guided":
            return guided(nn.ModuleList([network.backbone, network.cls_head]), logit, images), None
        case "ig":
            return complete(logit, images, torch.zeros_like(images))
        case "ig-blurred":
            return complete(logit, images, blurred(images))
        case "smoothgrad":
            return smoothed(lambda noisy: gradient(logit, noisy), images, draws(images)), None
        case "smoothgrad-ig":
            black = torch.zeros_like(images)
            return smoothed(lambda noisy: integrated(logit, noisy, black), images, draws(images, DRAWS_IG)), None
        case "attention":
            return attention(network.backbone, inputs), None
        case "rollout":
            return rollout(network.backbone, inputs), None
    raise LearnerError(f"method {method}: must be one of {', '.join(METHODS)}")


def blurred(images: Tensor, sigma: float = BLUR) -> Tensor:
    """Return images (B, 1, S, S) with Gaussian blur of `sigma` pixels."""
    return blur(images[:, 0], torch.full((len(images),), sigma, device=images.device, dtype=images.dtype))[:, None]


def shown(made: Tensor, positive: bool = False) -> Tensor:
    """Return a map for display, same shape, in [0, 1]: absolute values (or positive ones only), 1 from the 99th percentile."""
    strength = made.clamp(min=0) if positive else made.abs()
    top = strength.flatten(1).quantile(CLIP, dim=1).view(-1, *[1] * (made.ndim - 1))
    return (strength / top.clamp(min=torch.finfo(made.dtype).tiny)).clamp(max=1)


def open_state(path: Path) -> tuple[Network, Recipe, list[str]]:
    """Return the served network of a round's state.safetensors in eval mode, its recipe and its findings.

    Raises LearnerError.
    """
    try:
        tensors, header = read_file(path)
        # keys that a later version added get their defaults, which is how the older version trained
        plan, recipe, findings = header["plan"], Recipe().override(header["recipe"]), header["findings"]
        network = make_network(plan, recipe, len(findings))
        load_network(network, tensors, f"{recipe.serve}.")
    except (OSError, SafetensorError, KeyError, LearnerError) as error:
        raise LearnerError(f"{path}: not the state of a trained round ({error})") from None
    return network.eval().requires_grad_(False), recipe, findings


def main(arguments: list[str] | None = None) -> int:
    """Write maps, float32 (maps, h, w) in [0, 1], and print `{"logit", "completeness"}`; exit 1 with one line on errors."""
    parser = argparse.ArgumentParser(prog="python -m learner.explain.saliency", description="Write a saliency map.")
    parser.add_argument("state", type=Path, help="state.safetensors of a round")
    parser.add_argument("plate", type=Path, help=".npy, uint8 [512, 512]")
    parser.add_argument("--finding", required=True)
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--positive", action="store_true", help="only evidence for the finding")
    parser.add_argument("--out", type=Path, required=True, help="the map, .npy")
    options = parser.parse_args(arguments)
    try:
        network, recipe, findings = open_state(options.state)
        if options.finding not in findings:
            raise LearnerError(f"--finding {options.finding}: this network has {', '.join(findings)}")
        torch.set_num_threads(recipe.threads or os.cpu_count() or 1)
        plate = torch.from_numpy(read_plate(options.plate))
        images = to_image(plate[None], resize_matrix(PLATE_SHAPE[0], recipe.image_size))
        finding = findings.index(options.finding)
        saliency_map, error = explain(network, recipe, images, finding, options.method)
        with torch.no_grad():
            logit = network.classify(normalise(images, recipe))[0, finding].item()
    except LearnerError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    # attention has one map for each head: scale each on its own
    maps = shown(saliency_map[0][:, None], options.positive)[:, 0]
    np.save(options.out, maps.detach().numpy().astype(np.float32))
    sys.stdout.write(json.dumps({"logit": logit, "completeness": error}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
