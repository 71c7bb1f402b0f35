"""The two heads on a backbone, and the network that carries them over many crops at once.

Shapes only: no loss, no optimiser, no image file. Views go in and logits come out *view-major*: all images of view 0,
then all of view 1, and so on.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner.errors import LearnerError
from learner.networks.architecture import Plan
from learner.networks.backbone import Backbone, build
from learner.networks.convnet import ConvNet
from learner.round.recipe import Recipe


class DinoHead(nn.Module):
    """CLS (N, D) -> prototype logits (N, K): an MLP, L2 norm, then cosines to K prototypes (weight norm, g frozen at 1)."""

    def __init__(self, dim: int, prototypes: int, hidden: int, bottleneck: int, batch_norm: bool = False) -> None:
        super().__init__()
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
        return self.last_layer(F.normalize(self.mlp(cls), dim=-1))


class Prototypes(nn.Module):
    """Weight-normalised linear layer without bias: w = g v / |v| by row, g = 1 and never trained."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=False)
        self.weight_v = nn.Parameter(nn.init.trunc_normal_(torch.empty(count, width), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True))


class ClassHead(nn.Module):
    """Embedding (N, D) -> one logit a finding (N, F): Linear-ReLU-Linear-ReLU-Linear; one Linear with hidden = 0."""

    def __init__(self, dim: int, findings: int, hidden: int) -> None:
        super().__init__()
        self.findings = findings
        inner = [nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()] if hidden else []
        self.mlp = nn.Sequential(*inner, nn.Linear(hidden or dim, findings))
        self.apply(small_init)

    def forward(self, cls: Tensor) -> Tensor:
        return self.mlp(cls)

    def gradient(self, cls: Tensor) -> Tensor:
        """d logit / d CLS in closed form: (N, F, D); plain products, so that it exports."""
        if len(self.mlp) == 1:
            return cast(nn.Linear, self.mlp[0]).weight * torch.ones_like(cls[:, :1, None])
        first, second, last = (cast(nn.Linear, self.mlp[i]) for i in (0, 2, 4))
        one = first(cls)
        two = second(one.relu())
        back = last.weight[None] * (two > 0).to(cls.dtype)[:, None]  # (N, F, hidden)
        back = (back @ second.weight) * (one > 0).to(cls.dtype)[:, None]
        return back @ first.weight


def small_init(module: nn.Module) -> None:
    """Linear layers: truncated normal of deviation .02, bias 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class Network(nn.Module):
    """Backbone, prototype head and class head; student and teacher are two of these.

    Without self-supervision there is no prototype head, and the embedding itself comes out in its place.
    """

    def __init__(self, backbone: Backbone | ConvNet, head: DinoHead | nn.Identity, cls_head: ClassHead) -> None:
        super().__init__()
        self.backbone, self.head, self.cls_head = backbone, head, cls_head
        self.mask: nn.Parameter | None = None  # stands in for masked patches, where a recipe masks any
        self.patch_head: DinoHead | None = None  # answers for them

    def forward(self, views: list[Tensor], cls_views: int = 2) -> tuple[Tensor, Tensor]:
        """Views of B images, largest first -> prototype logits (V B, K) and class logits of the first two (2 B, F)."""
        cls = self.encode(views)
        return self.head(cls), self.cls_head(cls[: cls_views * views[0].shape[0]])

    def encode(self, views: list[Tensor]) -> Tensor:
        """One backbone pass a resolution: (V B, D), view-major."""
        outputs, start = [], 0
        for end in range(1, len(views) + 1):
            if end == len(views) or views[end].shape[1:] != views[start].shape[1:]:
                outputs.append(self.backbone(torch.cat(views[start:end])))
                start = end
        return torch.cat(outputs)

    def classify(self, images: Tensor) -> Tensor:
        """Class logits (B, F)."""
        return self.cls_head(self.backbone(images))


def make_network(plan: Plan, recipe: Recipe, findings: int, drop_path: float = 0.0) -> Network:
    """A network of this plan with random weights from the current torch seed; no prototypes, no prototype head."""
    backbone = build(plan, recipe.pos_embed, recipe.pool, drop_path).freeze(recipe.frozen_blocks)
    head: DinoHead | nn.Identity = nn.Identity()
    if recipe.prototypes:
        head = DinoHead(backbone.dim, recipe.prototypes, recipe.head_hidden, recipe.bottleneck)
    network = Network(backbone, head, ClassHead(backbone.dim, findings, recipe.class_hidden))
    if recipe.ibot:
        if not isinstance(backbone, Backbone):
            raise LearnerError(f"ibot = {recipe.ibot}: {backbone.name} has no patches to mask; set it to 0")
        width = backbone.vit.embed_dim
        network.mask = nn.Parameter(torch.zeros(width))
        network.patch_head = DinoHead(width, recipe.prototypes, recipe.head_hidden, recipe.bottleneck)
    return network
