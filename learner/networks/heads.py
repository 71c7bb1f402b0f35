"""The DINO head and the class head, and the network of backbone and heads.

Views and logits are in *view-major* order: all images of view 0, then all images of view 1, and so on.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner.errors import LearnerError
from learner.networks.architecture import Plan
from learner.networks.backbone import Backbone, build
from learner.networks.convnet import ConvNet
from learner.networks.pooling import WIDTHS
from learner.round.recipe import Recipe


class DinoHead(nn.Module):
    """Embeddings (N, D) to prototype logits (N, K): MLP, L2 normalisation, cosines with K prototypes (Caron et al. 2021).

    The prototypes are a weight-normalised layer whose g is frozen at 1. With `cells`, an embedding is the cells of an
    image, D each; the head takes their mean, because a crop has other places in its cells than the whole image.
    """

    def __init__(
        self, dim: int, prototypes: int, hidden: int, bottleneck: int, batch_norm: bool = False, cells: int = 1
    ) -> None:
        super().__init__()
        self.cells, dim = cells, dim // cells
        layers: list[nn.Module] = []
        for inner in (dim, hidden):
            layers.append(nn.Linear(inner, hidden))
            if batch_norm:
                layers.append(nn.BatchNorm1d(hidden))
            layers.append(nn.GELU())
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        self.apply(small_init)
        self.last_layer = Prototypes(bottleneck, prototypes)

    def forward(self, cls: Tensor) -> Tensor:
        if self.cells > 1:
            cls = cls.unflatten(-1, (self.cells, -1)).mean(-2)
        return self.last_layer(F.normalize(self.mlp(cls), dim=-1))


class Prototypes(nn.Module):
    """A weight-normalised linear layer without bias: each row w = g v / |v|, g = 1 and not trained."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=False)
        self.weight_v = nn.Parameter(nn.init.trunc_normal_(torch.empty(count, width), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True))


class ClassHead(nn.Module):
    """Embeddings (N, D) to one logit for each finding (N, F): three Linear layers with ReLU, or one with hidden = 0."""

    def __init__(self, dim: int, findings: int, hidden: int) -> None:
        super().__init__()
        self.findings = findings
        inner = [nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()] if hidden else []
        self.mlp = nn.Sequential(*inner, nn.Linear(hidden or dim, findings))
        self.apply(small_init)

    def forward(self, cls: Tensor) -> Tensor:
        return self.mlp(cls)

    def gradient(self, cls: Tensor) -> Tensor:
        """Return d logit / d embedding, (N, F, D), in closed form without autograd, so that it can be exported."""
        if len(self.mlp) == 1:
            return cast(nn.Linear, self.mlp[0]).weight * torch.ones_like(cls[:, :1, None])
        first, second, last = (cast(nn.Linear, self.mlp[i]) for i in (0, 2, 4))
        hidden_1 = first(cls)
        hidden_2 = second(hidden_1.relu())
        back = last.weight[None] * (hidden_2 > 0).to(cls.dtype)[:, None]  # (N, F, hidden)
        back = (back @ second.weight) * (hidden_1 > 0).to(cls.dtype)[:, None]
        return back @ first.weight


def small_init(module: nn.Module) -> None:
    """Initialise a linear layer as DINO does: truncated normal with standard deviation .02, bias 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class Network(nn.Module):
    """Backbone, DINO head and class head; student and teacher are two such networks.

    Without prototypes the DINO head is an Identity, which returns the embedding.
    """

    def __init__(self, backbone: Backbone | ConvNet, head: DinoHead | nn.Identity, cls_head: ClassHead) -> None:
        super().__init__()
        self.backbone, self.head, self.cls_head = backbone, head, cls_head
        self.mask: nn.Parameter | None = None  # mask token (width,), in recipes that mask patches
        self.patch_head: DinoHead | None = None  # prototype logits of masked patches

    def forward(self, views: list[Tensor], cls_views: int = 2) -> tuple[Tensor, Tensor]:
        """Return prototype logits (V B, K) of all views of B images and class logits (2 B, F) of the first two views."""
        cls = self.encode(views)
        return self.head(cls), self.cls_head(cls[: cls_views * views[0].shape[0]])

    def encode(self, views: list[Tensor]) -> Tensor:
        """Return embeddings (V B, D), view-major; one forward pass for consecutive views of the same size."""
        outputs, start = [], 0
        for end in range(1, len(views) + 1):
            if end == len(views) or views[end].shape[1:] != views[start].shape[1:]:
                outputs.append(self.backbone(torch.cat(views[start:end])))
                start = end
        return torch.cat(outputs)

    def classify(self, images: Tensor) -> Tensor:
        """Return class logits (B, F)."""
        return self.cls_head(self.backbone(images))


def make_network(plan: Plan, recipe: Recipe, findings: int, drop_path: float = 0.0) -> Network:
    """Return a network of this plan with random weights from torch's current seed. Raises LearnerError for ibot on a CNN."""
    backbone = build(plan, recipe.pos_embed, recipe.pool, drop_path).freeze(recipe.frozen_blocks)
    head: DinoHead | nn.Identity = nn.Identity()
    if recipe.prototypes:
        cells = WIDTHS["grid"] if backbone.pool == "grid" else 1
        head = DinoHead(backbone.dim, recipe.prototypes, recipe.head_hidden, recipe.bottleneck, cells=cells)
    network = Network(backbone, head, ClassHead(backbone.dim, findings, recipe.class_hidden))
    if recipe.ibot:
        if not isinstance(backbone, Backbone):
            raise LearnerError(f"ibot = {recipe.ibot}: {backbone.name} has no patches to mask; set it to 0")
        width = backbone.vit.embed_dim
        network.mask = nn.Parameter(torch.zeros(width))
        network.patch_head = DinoHead(width, recipe.prototypes, recipe.head_hidden, recipe.bottleneck)
    return network
