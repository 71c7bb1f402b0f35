"""Any timm convolutional net as the encoder, with the face of a `Backbone`: images in, the mean over places out.

It has one embedding and no positions, so `pool`, `pos_embed`, `drop_path` and a mimetic start mean nothing here and
change nothing. It has no attention either, and says so when asked. Knows nothing of heads, losses or findings.
"""

from typing import Never, cast

import torch
from torch import Tensor, nn

from learner.errors import LearnerError

TRIED = 128  # px of the blank image that tells width and stride: four places a side at the usual stride of 32


class ConvNet(nn.Module):
    """A convolutional net: images (B, 1 or 3, H, W) of any size above its stride -> mean feature (B, D).

    Raises LearnerError for a net whose features aren't a map of channels (B, D, h, w) at every image size.
    """

    pool = "mean"

    def __init__(self, net: nn.Module, name: str) -> None:
        super().__init__()
        self.net, self.name = net, name
        cfg = getattr(net, "pretrained_cfg", None) or {}
        if cfg.get("fixed_input_size") or getattr(net, "output_fmt", "NCHW") != "NCHW":
            raise _no_features(name)
        shape = _keep_what_runs(net)
        if len(shape) != 4:
            raise _no_features(name)
        self.dim = shape[1]
        self.patch = TRIED // shape[2]  # total stride; image sides are rounded to it, as to a patch

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images).mean((2, 3))

    def features(self, images: Tensor) -> Tensor:
        """The last feature map: (B, D, h, w)."""
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return self.net.forward_features(images)  # pyright: ignore[reportCallIssue] (every timm net has it)

    def trace(self, images: Tensor) -> tuple[Tensor, "ConvTrace"]:
        """The embedding (B, D), and the map it is the mean of."""
        features = self.features(images)
        return features.mean((2, 3)), ConvTrace(features)

    def attentions(self, images: Tensor) -> Never:
        """Refused: there is none."""
        raise LearnerError(f"{self.name} is a convolutional net and has no attention; use another method")

    def freeze(self, blocks: int) -> "ConvNet":
        """Raises LearnerError for any: a convolutional net has no blocks of equal shape to freeze."""
        if blocks:
            raise LearnerError(f"frozen_blocks = {blocks}: {self.name} is no transformer; set it to 0")
        return self

    def load(self, weights: dict[str, Tensor]) -> None:
        """Weights under timm's key names."""
        self.net.load_state_dict(weights)


class ConvTrace:
    """One forward pass, kept to attribute a direction of the embedding to places."""

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def contributions(self, directions: Tensor) -> Tensor:
        """Share of each place along `directions` (B, F, D): (B, F, h, w), which sums to direction . embedding.

        The class activation map (Zhou et al., CVPR 2016) with the head's own slope as its weights.
        """
        high, wide = self.features.shape[2:]
        return (directions @ self.features.flatten(2) / (high * wide)).unflatten(-1, (high, wide))


@torch.no_grad()
def _keep_what_runs(net: nn.Module) -> torch.Size:
    """Shape of the features of one blank image; parts that they don't pass through (classifiers) become nothing.

    VGG would carry 120 million unused weights through teacher, student and Adam otherwise.
    """
    ran: set[nn.Module] = set()
    hooks = [part.register_forward_hook(lambda part, *_: ran.add(part)) for part in net.modules()]
    was_training = net.training
    features = net.eval().forward_features(torch.zeros(1, 3, TRIED, TRIED))  # pyright: ignore[reportCallIssue]
    net.train(was_training)
    for hook in hooks:
        hook.remove()
    for name, part in net.named_children():
        if ran.isdisjoint(part.modules()):
            setattr(net, name, nn.Identity())
    return cast(Tensor, features).shape


def _no_features(name: str) -> LearnerError:
    return LearnerError(
        f'backbone = "{name}": needs a plain vision transformer with one class token, learned positions and a last norm, '
        "or a convolutional net that takes any image size"
    )
