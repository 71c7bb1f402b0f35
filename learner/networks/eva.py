"""timm's EVA-02 transformers (EVA-X has the same network) as the encoder: rotary positions, gated MLP, class token."""

from collections.abc import Iterable
from math import isqrt
from typing import TypeGuard, cast

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from learner.networks.vit import Backbone


class EvaBackbone(Backbone):
    """An EVA-02 transformer: square images (B, 1 or 3, S, S) to embeddings (B, D), with the interface of `Backbone`.

    Each block gets the rotary positions of the tokens' square grid, which it applies to queries and keys of patches.
    """

    def __init__(self, eva: Eva, pos_embed: str = "dino", pool: str = "cls") -> None:
        # Eva has all attributes of VisionTransformer that Backbone reads; only its blocks are called in another way
        super().__init__(cast(VisionTransformer, eva), pos_embed, pool)

    def run(self, blocks: Iterable[nn.Module], tokens: Tensor) -> Tensor:
        """Return the tokens (B, 1 + h w, width) behind these blocks of this network; h = w."""
        rope = self.rotation(tokens)
        for block in blocks:
            tokens = block(tokens, rope=rope)
        return tokens

    def rotation(self, tokens: Tensor) -> Tensor:
        """Return sines and cosines (h w, 2 x head width) of the patches' grid, which is square."""
        side = isqrt(tokens.shape[1] - self.vit.num_prefix_tokens)
        return cast(RotaryEmbeddingCat, self.vit.rope).get_embed(shape=[side, side])

    def heads(self, block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query (rotated, scaled), key (rotated) and value: each (B, heads, tokens, width of a head)."""
        attention, normed = cast(EvaAttention, block.attn), cast(EvaBlock, block).norm1(tokens)
        if attention.qkv is None:
            layers = (attention.q_proj, attention.k_proj, attention.v_proj)
            packed = torch.cat([cast(nn.Linear, layer)(normed) for layer in layers], -1)
        else:
            biases = [cast(Tensor, bias) for bias in (attention.q_bias, attention.k_bias, attention.v_bias)]
            packed = F.linear(normed, attention.qkv.weight, torch.cat(biases))
        heads = packed.unflatten(-1, (3, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        first, rope = self.vit.num_prefix_tokens, self.rotation(tokens)

        def rotated(part: Tensor) -> Tensor:
            turned = apply_rot_embed_cat(part[:, :, first:], rope)
            return torch.cat([part[:, :, :first], turned], 2).type_as(value)

        return rotated(query) * attention.scale, rotated(key), value

    def projection(self, block: nn.Module) -> Tensor:
        """Return the matrix (width, heads x head width) from the heads of a block's attention to what it adds to a token."""
        return cast(EvaAttention, block.attn).proj.weight


def is_eva_02(net: nn.Module) -> TypeGuard[Eva]:
    """Whether a network is an EVA-02 that `EvaBackbone` computes: one class token, learned and rotary positions.

    Not so: DINOv3, PE, mixed rotary positions, norms or gates within the attention, layer scale, norms of queries and keys.
    """
    if type(net) is not Eva or type(net.blocks[-1]) is not EvaBlock:
        return False
    block, attention = net.blocks[-1], net.blocks[-1].attn
    return (
        type(attention) is EvaAttention and type(net.rope) is RotaryEmbeddingCat and isinstance(net.norm, nn.LayerNorm)
        and net.cls_token is not None and net.reg_token is None and net.pos_embed is not None and net.attn_pool is None
        and block.gamma_1 is None and attention.gate is None and not attention.rotate_half
        and (attention.qkv is None or attention.q_bias is not None)
        and all(isinstance(part, nn.Identity) for part in (attention.norm, attention.q_norm, attention.k_norm))
    )  # fmt: skip
