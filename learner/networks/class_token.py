"""A transformer block of which only the class token is wanted: its attention and MLP for one token instead of all.

Exactly `block(tokens)[:, :1]`; the patches still give keys and values. In the last of 12 blocks this leaves about a
fourteenth of a ViT's arithmetic undone.
"""

from typing import TypeGuard, cast

import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn


def class_token(block: nn.Module, tokens: Tensor) -> Tensor:
    """Tokens (B, T, D) -> the class token behind this block (B, 1, D); any other kind of block is run in full."""
    if not is_plain_block(block):
        return block(tokens)[:, :1]
    attention = cast(Attention, block.attn)
    seen, width = block.norm1(tokens), attention.attn_dim
    weight, bias = attention.qkv.weight, cast(Tensor | None, attention.qkv.bias)
    first, rest = (None, None) if bias is None else bias.split([width, 2 * width])
    query = F.linear(seen[:, :1], weight[:width], first).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    packed = F.linear(seen, weight[width:], rest).unflatten(-1, (2, attention.num_heads, attention.head_dim))
    key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, T, width of a head)
    dropped = attention.attn_drop.p if attention.training else 0.0
    heads = F.scaled_dot_product_attention(attention.q_norm(query), attention.k_norm(key), value, dropout_p=dropped)
    return finish_block(block, tokens[:, :1], heads)


def is_plain_block(block: nn.Module) -> TypeGuard[Block]:
    """Whether a block is timm's plain one, whose parts are known."""
    attention = getattr(block, "attn", None)
    return type(block) is Block and type(attention) is Attention and attention.gate is None


def finish_block(block: Block, token: Tensor, heads: Tensor) -> Tensor:
    """The rest of a block, from what its heads (B, heads, 1, width of a head) say to the token (B, 1, D) that came in."""
    attention = cast(Attention, block.attn)
    said = attention.proj_drop(attention.proj(attention.norm(heads.transpose(1, 2).flatten(2))))
    token = token + block.drop_path1(block.ls1(said))
    return token + block.drop_path2(block.ls2(block.mlp(block.norm2(token))))
