"""Mimetic initialisation of vision transformers, for rounds with too few images to train attention from scratch.

Draws attention weights whose products look like trained ones: query-key near the identity, value-projection near its
negative (Trockman & Kolter, "Mimetic initialization of self-attention layers", ICML 2023), with sine-cosine positions.
"""

from typing import cast

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

QUERY_KEY = (0.7, 0.7)  # scales of noise and identity in query x key
VALUE_PROJECTION = (0.4, -0.4)  # scales of noise and identity in value x projection
POSITION_SCALE = 0.5  # of the position embeddings; timm's .02 is small beside untrained patch embeddings


@torch.no_grad()
def mimic_trained(net: nn.Module) -> None:
    """Overwrite attention weights and position embeddings of the transformer in `net`, with torch's generator.

    Leaves a convolutional network unchanged.
    """
    for module in net.modules():
        if isinstance(module, VisionTransformer):
            _mimic(module)


def _mimic(vit: VisionTransformer) -> None:
    for block in vit.blocks:
        attention = cast(Attention, cast(Block, block).attn)
        dim, width = attention.qkv.in_features, attention.head_dim
        for head in range(attention.num_heads):
            query, key = _factors(dim, *QUERY_KEY)
            rows = slice(head * width, (head + 1) * width)
            attention.qkv.weight[:dim][rows] = query.T[:width]
            attention.qkv.weight[dim : 2 * dim][rows] = key[:width]
        project, value = _factors(dim, *VALUE_PROJECTION)
        attention.qkv.weight[2 * dim :] = value
        attention.proj.weight.copy_(project)
    high, wide = vit.patch_embed.grid_size
    cast(Tensor, vit.pos_embed)[:, -high * wide :] = sine_cosine(high, wide, vit.embed_dim) * POSITION_SCALE


def _factors(dim: int, noise: float, identity: float) -> tuple[Tensor, Tensor]:
    """Return two (dim, dim) matrices whose product is noise / sqrt(dim) N(0, 1) + identity I, largest singular value first."""
    product = noise * torch.randn(dim, dim) / dim**0.5 + identity * torch.eye(dim)
    left, strength, right = torch.linalg.svd(product)
    return left * strength.sqrt(), strength.sqrt()[:, None] * right


def sine_cosine(high: int, wide: int, dim: int) -> Tensor:
    """Return two-dimensional sine-cosine position embeddings, (high wide, dim)."""
    waves = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(high).float(), torch.arange(wide).float(), indexing="ij")
    across, down = x.reshape(-1, 1) * waves, y.reshape(-1, 1) * waves
    return torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], dim=1)
