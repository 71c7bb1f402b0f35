"""Where a network looked: maps of one finding's logit (never its probability) over an image, in the image's own pixels.

`python -m learner.explain.saliency STATE PLATE --finding F --method M --out MAP` writes one; on the CPU, which is enough for one
image. Knows no ledger and no bundle, and draws no picture. A method that isn't defined for a network is refused by name,
an integral that doesn't add up too.
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
from learner.data.augment import blur, normalise, resize_matrix, to_image
from learner.data.plates import read_plate
from learner.engine.checkpoint import load_network, read_file
from learner.errors import LearnerError
from learner.networks.backbone import Backbone
from learner.networks.convnet import ConvNet
from learner.networks.heads import Network, make_network
from learner.round.recipe import Recipe

METHODS = (
    "heatmap", "gradient", "guided", "ig", "ig-blurred", "smoothgrad", "smoothgrad-ig", "attention", "rollout",
)  # fmt: skip
STEPS = 50  # of the integral, at the middle of each: Ho & Gwak, IEEE Access 2020
MOST_STEPS = 400  # a kinked network gets more, up to these
COMPLETE = 0.05  # largest error of the sum of an integral, as a share of what it must add up to
BLUR = 10.0  # sigma, in pixels of the network's image
DRAWS, SPREAD = 25, 0.15  # SmoothGrad: noisy copies, and their deviation as a share of the image's range
DRAWS_IG = 10  # each is a whole integral
CLIP = 0.99  # quantile shown as full strength, so that one pixel doesn't hide the rest

Logit = Callable[[Tensor], Tensor]  # images (B, ...) -> one finding's logit (B,)


def gradient(logit: Logit, images: Tensor) -> Tensor:
    """d logit / d image, of the images' shape (B, ...)."""
    images = images.detach().requires_grad_()
    return torch.autograd.grad(logit(images).sum(), images)[0]


def guided(network: nn.Module, logit: Logit, images: Tensor) -> Tensor:
    """Guided backpropagation (Springenberg et al., ICLR workshop 2015): each ReLU passes R 1[R > 0] 1[f > 0] back.

    Raises LearnerError where something other than a ReLU bends: the rule is defined for ReLU only.
    """
    with _guiding(network):
        return gradient(logit, images)


@contextmanager
def _guiding(network: nn.Module) -> Iterator[None]:
    bends = [part for part in network.modules() if ".activation" in type(part).__module__]
    others = sorted({type(part).__name__ for part in bends if not isinstance(part, (nn.ReLU, nn.ReLU6))})
    if others or not bends:
        raise LearnerError(
            f"this network has {', '.join(others) or 'no ReLU'}, and guided backpropagation is defined for ReLU "
            "alone (resnet, densenet, vgg); ask for gradient, ig or smoothgrad"
        )

    def positive_only(_part: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda back: back.clamp(min=0))

    hooks = [part.register_forward_hook(positive_only) for part in bends]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def integrated(logit: Logit, images: Tensor, baseline: Tensor, steps: int = STEPS) -> Tensor:
    """Integrated gradients (Sundararajan et al., ICML 2017), midpoint rule: (x - b) mean of d logit at b + a (x - b)."""
    total = torch.zeros_like(images)
    for step in range(steps):
        total += gradient(logit, baseline + (step + 0.5) / steps * (images - baseline))
    return (images - baseline) * total / steps


def completeness(logit: Logit, images: Tensor, baseline: Tensor, made: Tensor) -> Tensor:
    """|sum of the map - (S(x) - S(b))| / |S(x) - S(b)|: (B,); 0 for an exact integral."""
    with torch.no_grad():
        gain = logit(images) - logit(baseline)
    return (made.flatten(1).sum(1) - gain).abs() / gain.abs()


def complete(logit: Logit, images: Tensor, baseline: Tensor) -> tuple[Tensor, float]:
    """Integrated gradients with as many steps as they need, and the largest completeness error.

    Raises LearnerError when the sum is still off by COMPLETE at MOST_STEPS.
    """
    steps, made, error = STEPS, images, float("inf")
    while steps <= MOST_STEPS:
        made = integrated(logit, images, baseline, steps)
        error = float(completeness(logit, images, baseline, made).max())
        if error < COMPLETE:
            return made, error
        steps *= 2
    raise LearnerError(
        f"integrated gradients: the sum is {error:.0%} off after {MOST_STEPS} steps (allowed {COMPLETE:.0%}): "
        "image and baseline score alike, or the network is too kinked; ask for another baseline or for smoothgrad"
    )


def smoothed(explain: Callable[[Tensor], Tensor], images: Tensor, noise: Tensor) -> Tensor:
    """SmoothGrad (Smilkov et al., 2017): the mean of `explain(images + n)` over the rows n of `noise` (N, B, ...)."""
    return torch.stack([explain(images + row) for row in noise]).mean(0)


def draws(images: Tensor, count: int = DRAWS, spread: float = SPREAD, seed: int = 0) -> Tensor:
    """Gaussian noise (N, B, ...) of deviation `spread` x (max - min) of each image; the same for the same seed."""
    source = torch.Generator().manual_seed(seed)
    plain = torch.randn((count, *images.shape), generator=source, dtype=images.dtype).to(images.device)
    flat = images.flatten(1)
    return plain * (spread * (flat.amax(1) - flat.amin(1))).view(-1, *[1] * (images.ndim - 1))


@torch.no_grad()
def attention(backbone: Backbone | ConvNet, images: Tensor) -> Tensor:
    """What the embedding looks at in the last block, head by head: (B, heads, h, w). It knows no finding."""
    return _of_patches(backbone, backbone.attentions(images)[-1], images)


@torch.no_grad()
def rollout(backbone: Backbone | ConvNet, images: Tensor) -> Tensor:
    """Attention followed through all blocks, half of it past the block (Abnar & Zuidema, ACL 2020): (B, 1, h, w)."""
    seen = backbone.attentions(images)
    through = torch.eye(seen[0].shape[-1], dtype=images.dtype, device=images.device)
    for block in seen:
        through = (0.5 * block.mean(1) + 0.5 * torch.eye(block.shape[-1]).to(block)) @ through
    return _of_patches(backbone, through[:, None], images)


def _of_patches(backbone: Backbone | ConvNet, looks: Tensor, images: Tensor) -> Tensor:
    """The row of the class token, or the mean row where patches are averaged, without the prefix: (B, heads, h, w)."""
    prefix = cast(Backbone, backbone).vit.num_prefix_tokens
    rows = looks[:, :, prefix:].mean(2) if backbone.pool == "mean" else looks[:, :, 0]
    high, wide = (side // backbone.patch for side in images.shape[-2:])
    return rows[:, :, prefix:].unflatten(-1, (high, wide))


def explain(network: Network, recipe: Recipe, images: Tensor, finding: int, method: str) -> tuple[Tensor, float | None]:
    """Map of one finding by a method of METHODS, signed, and the completeness error of an integral.

    `images` (B, 1, S, S) in [0, 1], as `to_image` makes them: a baseline of zero is a black image. Per pixel (B, 1, S, S),
    per place (B, 1, h, w) for heatmap and rollout, per place and head for attention. `network` in evaluation mode.
    """
    seen = normalise(images, recipe)

    def logit(images: Tensor) -> Tensor:
        return network.classify(normalise(images, recipe))[:, finding]

    match method:
        case "heatmap":
            with torch.no_grad():
                embedding, trace = network.backbone.trace(seen)
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
            return attention(network.backbone, seen), None
        case "rollout":
            return rollout(network.backbone, seen), None
    raise LearnerError(f"method {method}: must be one of {', '.join(METHODS)}")


def blurred(images: Tensor, sigma: float = BLUR) -> Tensor:
    """Images (B, 1, S, S) without detail: Gaussian blur of `sigma` pixels."""
    return blur(images[:, 0], torch.full((len(images),), sigma, device=images.device, dtype=images.dtype))[:, None]


def shown(made: Tensor, positive: bool = False) -> Tensor:
    """A map in [0, 1] for the eye, same shape: |.| (or what speaks for the finding), full at its 99th percentile."""
    made = made.clamp(min=0) if positive else made.abs()
    top = made.flatten(1).quantile(CLIP, dim=1).view(-1, *[1] * (made.ndim - 1))
    return (made / top.clamp(min=torch.finfo(made.dtype).tiny)).clamp(max=1)


def open_state(path: Path) -> tuple[Network, Recipe, list[str]]:
    """The network of a round's state.safetensors that went into its bundle, in evaluation mode; raises LearnerError."""
    try:
        tensors, header = read_file(path)
        # a key that a later version added has its default here, which is how that older network was trained
        plan, recipe, findings = header["plan"], Recipe().override(header["recipe"]), header["findings"]
        network = make_network(plan, recipe, len(findings))
        load_network(network, tensors, f"{recipe.serve}.")
    except (OSError, SafetensorError, KeyError, LearnerError) as error:
        raise LearnerError(f"{path}: not the state of a trained round ({error})") from None
    return network.eval().requires_grad_(False), recipe, findings


def main(arguments: list[str] | None = None) -> int:
    """Write float32 (maps, h, w) in [0, 1] and say `{"logit", "completeness"}`; exit 1 with one line on a refusal."""
    parser = argparse.ArgumentParser(prog="python -m learner.explain.saliency", description="Where a network looked.")
    parser.add_argument("state", type=Path, help="state.safetensors of a round")
    parser.add_argument("plate", type=Path, help=".npy, uint8 [512, 512]")
    parser.add_argument("--finding", required=True)
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--positive", action="store_true", help="only what speaks for the finding")
    parser.add_argument("--out", type=Path, required=True, help="where the map goes, .npy")
    asked = parser.parse_args(arguments)
    try:
        network, recipe, findings = open_state(asked.state)
        if asked.finding not in findings:
            raise LearnerError(f"--finding {asked.finding}: this network knows {', '.join(findings)}")
        torch.set_num_threads(recipe.threads or os.cpu_count() or 1)
        plate = torch.from_numpy(read_plate(asked.plate))
        images = to_image(plate[None], resize_matrix(PLATE_SHAPE[0], recipe.image_size))
        place = findings.index(asked.finding)
        made, error = explain(network, recipe, images, place, asked.method)
        with torch.no_grad():
            logit = network.classify(normalise(images, recipe))[0, place].item()
    except LearnerError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    # heads of an attention are separate maps: each is shown at its own strength
    maps = shown(made[0][:, None], asked.positive)[:, 0]
    np.save(asked.out, maps.detach().numpy().astype(np.float32))
    sys.stdout.write(json.dumps({"logit": logit, "completeness": error}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
