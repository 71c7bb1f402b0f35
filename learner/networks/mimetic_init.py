"""A random start that already looks at its surroundings, for transformers that see too few images to learn that.

Attention weights are drawn so that their products have the structure of trained ones (Trockman & Kolter, "Mimetic
initialization of self-attention layers", ICML 2023: query-key near the identity, value-projection near its
negative), over sine-cosine positions. No image and no pretrained weight is involved.
"""

from typing import cast

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

LOOK = (0.7, 0.7)  # noise and identity in query x key
SAY = (0.4, -0.4)  # noise and identity in value x projection
POSITION = 0.5  # scale of the position table: timm's .02 is lost behind the patches at first


@torch.no_grad()
def mimic_trained(net: nn.Module) -> None:
    """Overwrite attention weights and positions of the transformer in `net`, drawing from torch's generator.

    A convolutional net has neither, and stays as it is.
    """
    for part in net.modules():
        if isinstance(part, VisionTransformer):
            _mimic(part)


def _mimic(vit: VisionTransformer) -> None:
    for block in vit.blocks:
        attention = cast(Attention, cast(Block, block).attn)
        dim, width = attention.qkv.in_features, attention.head_dim
        for head in range(attention.num_heads):
            query, key = _factors(dim, *LOOK)
            rows = slice(head * width, (head + 1) * width)
            attention.qkv.weight[:dim][rows] = query.T[:width]
            attention.qkv.weight[dim : 2 * dim][rows] = key[:width]
        project, value = _factors(dim, *SAY)
        attention.qkv.weight[2 * dim :] = value
        attention.proj.weight.copy_(project)
    high, wide = vit.patch_embed.grid_size
    cast(Tensor, vit.pos_embed)[:, -high * wide :] = sine_cosine(high, wide, vit.embed_dim) * POSITION


def _factors(dim: int, noise: float, identity: float) -> tuple[Tensor, Tensor]:
    """Two (dim, dim) matrices, strongest direction first, whose product is noise / sqrt(dim) N(0, 1) + identity I."""
    product = noise * torch.randn(dim, dim) / dim**0.5 + identity * torch.eye(dim)
    left, strength, right = torch.linalg.svd(product)
    return left * strength.sqrt(), strength.sqrt()[:, None] * right


def sine_cosine(high: int, wide: int, dim: int) -> Tensor:
    """Two-dimensional sine-cosine position table: (high wide, dim)."""
    waves = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(high).float(), torch.arange(wide).float(), indexing="ij")
    across, down = x.reshape(-1, 1) * waves, y.reshape(-1, 1) * waves
    return torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], dim=1)
