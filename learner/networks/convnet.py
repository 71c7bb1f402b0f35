"""Any timm convolutional network as the encoder, with the interface of `Backbone`; the embedding is the mean feature.

Ignores `pool`, `pos_embed`, `drop_path` and mimetic initialisation, and has no attention.
"""

from typing import Never, cast

import torch
from torch import Tensor, nn

from learner.errors import LearnerError

PROBE_SIZE = 128  # pixels of a blank image that shows width and stride: 4 x 4 features at the usual stride of 32


class ConvNet(nn.Module):
    """A convolutional network: images (B, 1 or 3, H, W) of any size above its stride to mean features (B, D).

    Raises LearnerError for a network whose features are not (B, D, h, w) at every image size.
    """

    pool = "mean"

    def __init__(self, net: nn.Module, name: str) -> None:
        super().__init__()
        self.net, self.name = net, name
        cfg = getattr(net, "pretrained_cfg", None) or {}
        if cfg.get("fixed_input_size") or getattr(net, "output_fmt", "NCHW") != "NCHW":
            raise _no_features(name)
        shape = _drop_unused(net)
        if len(shape) != 4:
            raise _no_features(name)
        self.dim = shape[1]
        self.patch = PROBE_SIZE // shape[2]  # total stride in pixels; image sides are rounded to multiples

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images).mean((2, 3))

    def features(self, images: Tensor) -> Tensor:
        """Return the last feature map: (B, D, h, w)."""
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return self.net.forward_features(images)  # pyright: ignore[reportCallIssue] (every timm net has it)

    def trace(self, images: Tensor) -> tuple[Tensor, "ConvTrace"]:
        """Return the embedding (B, D) and the feature map that it is the mean of."""
        features = self.features(images)
        return features.mean((2, 3)), ConvTrace(features)

    def attentions(self, images: Tensor) -> Never:
        """Raise LearnerError: a convolutional network has no attention."""
        raise LearnerError(f"{self.name} is a convolutional network and has no attention; use another method")

    def freeze(self, blocks: int) -> "ConvNet":
        """Return self for 0 blocks; raise LearnerError for more: there are no blocks of equal shape to freeze."""
        if blocks:
            raise LearnerError(f"frozen_blocks = {blocks}: {self.name} is not a transformer; set it to 0")
        return self

    def load(self, weights: dict[str, Tensor]) -> None:
        """Load weights with timm's key names."""
        self.net.load_state_dict(weights)


class ConvTrace:
    """The feature map of one forward pass, to attribute directions of the embedding to positions."""

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def contributions(self, directions: Tensor) -> Tensor:
        """Return the contribution of each position along `directions` (B, F, D): (B, F, h, w); sums to direction . embedding.

        The class activation map (Zhou et al., CVPR 2016), with the gradient of the class head as its weights.
        """
        high, wide = self.features.shape[2:]
        return (directions @ self.features.flatten(2) / (high * wide)).unflatten(-1, (high, wide))


@torch.no_grad()
def _drop_unused(net: nn.Module) -> torch.Size:
    """Return the shape of the features of one blank image; replace modules that did not run (classifiers) by Identity.

    Otherwise teacher, student and Adam would hold the 120 million unused weights of a VGG.
    """
    used: set[nn.Module] = set()
    hooks = [module.register_forward_hook(lambda module, *_: used.add(module)) for module in net.modules()]
    was_training = net.training
    features = net.eval().forward_features(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE))  # pyright: ignore[reportCallIssue]
    net.train(was_training)
    for hook in hooks:
        hook.remove()
    for name, child in net.named_children():
        if used.isdisjoint(child.modules()):
            setattr(net, name, nn.Identity())
    return cast(Tensor, features).shape


def _no_features(name: str) -> LearnerError:
    return LearnerError(
        f'backbone = "{name}": needs a plain vision transformer with one class token, learned positions and a last norm, '
        "an EVA-02 transformer such as EVA-X, or a convolutional network that takes any image size"
    )
