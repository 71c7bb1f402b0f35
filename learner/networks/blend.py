"""The blend: the network's class logits plus those of linear heads on simple features, in one graph.

Several weak answers with different errors are more reliable than one, and on few labels none of them is best
everywhere. The shares are fitted in `learner.fits.blend_shares`.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from learner.errors import LearnerError
from learner.networks.pooling import spread_weights
from learner.networks.simple_features import STRIDES, Patches, Pixels

PREFIX = "blend."  # of its tensors in `State.extra`
FITTED = ("whiten", "offset", "centroids")  # tensors of `Patches`


class Part(nn.Module):
    """Simple features with a linear head; its weights include the part's share of the blend.

    weight (F, D), mean (D,) of the features over the train images.
    """

    weight: Tensor
    mean: Tensor
    grid: Tensor

    def __init__(self, features: Pixels | Patches, weight: Tensor, mean: Tensor) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("weight", weight.float())
        self.register_buffer("mean", mean.float())

    def forward(self, grey: Tensor) -> Tensor:
        """Return logits (B, F) of grey levels (B, 512, 512) in [0, 1], less those of the mean image."""
        return (self.features(grey) - self.mean) @ self.weight.T

    def set_grid(self, side: int) -> None:
        """Set the grid of `contributions`: side x side places."""
        self.register_buffer("grid", spread_weights(self.features.side, side).to(self.weight), persistent=False)

    def contributions(self, grey: Tensor) -> Tensor:
        """Return what each place adds to the logits, (B, F, side, side) of `set_grid`; the sum is `forward`."""
        return self.grid @ self.features.contributions(grey, self.weight, self.mean) @ self.grid.T


class Blend(nn.Module):
    """Logits = scale * network logits + the parts' logits + bias; scale and bias (F,)."""

    scale: Tensor
    bias: Tensor

    def __init__(self, scale: Tensor, bias: Tensor, parts: Mapping[str, Part]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.register_buffer("scale", scale.float())
        self.register_buffer("bias", bias.float())

    def forward(self, grey: Tensor, network: Tensor) -> Tensor:
        """Return logits (B, F) from grey levels (B, 512, 512) in [0, 1] and the network's logits (B, F)."""
        return self.scale * network + self.bias + sum(part(grey) for part in self.parts.values())

    def contributions(self, grey: Tensor, network: Tensor) -> Tensor:
        """Return the heatmap (B, F, g, g) of the blend from that of the network, (B, F, g, g), g of `set_grid`."""
        maps = self.scale[:, None, None] * network
        for part in self.parts.values():
            maps = maps + cast(Part, part).contributions(grey)
        return maps

    def set_grid(self, side: int) -> None:
        """Set the grid of the heatmap: side x side places."""
        for part in self.parts.values():
            cast(Part, part).set_grid(side)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, as `read_blend` takes them."""
        return {PREFIX + name: value.detach().clone() for name, value in self.state_dict().items()}


def feature_names() -> list[str]:
    """Return the names of all simple features."""
    return ["pixels", *(f"patches{size}" for size in STRIDES)]


def size_of(name: str) -> int:
    """Return the image side, in pixels, of patch features by name."""
    return int(name.removeprefix("patches"))


def read_blend(tensors: Mapping[str, Tensor]) -> Blend | None:
    """Return the blend whose `tensors` are among these, or None: rounds of other recipes have none.

    Raises LearnerError for simple features that this version does not know.
    """
    own = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    if not own:
        return None
    unknown = {name.split(".")[1] for name in own if name.startswith("parts.")} - {*feature_names()}
    if unknown:
        raise LearnerError(
            f"blend: unknown simple features {', '.join(sorted(unknown))}; this version knows {', '.join(feature_names())}. "
            "Use the version that trained the model, or start from another parent"
        )
    parts = {}
    for name in feature_names():
        at = f"parts.{name}."
        if at + "weight" in own:
            fitted = [own[f"{at}features.{key}"] for key in FITTED] if name != "pixels" else []
            features = Patches(size_of(name), *fitted) if fitted else Pixels()
            parts[name] = Part(features, own[at + "weight"], own[at + "mean"])
    return Blend(own["scale"], own["bias"], parts)


def grey_levels(plates: Tensor) -> Tensor:
    """Return plates, uint8 (B, 512, 512), as grey levels in [0, 1]."""
    return plates.to(torch.float32) / 255
