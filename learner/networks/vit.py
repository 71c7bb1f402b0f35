"""The vision transformer as the encoder: embeddings, tokens behind frozen blocks, attentions, and what attribution needs."""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.layer_scale import LayerScale
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from learner.errors import LearnerError
from learner.networks.attribution import Trace
from learner.networks.class_token import class_token, finish_block, is_plain_block
from learner.networks.pooling import WIDTHS, mirrored_cell_weights, pool_tokens


class Backbone(nn.Module):
    """A vision transformer: images (B, 1 or 3, H, W), H and W multiples of its patch, to embeddings (B, D).

    The embedding pools the last tokens (`learner.networks.pooling`): the class token ("cls", as published), the mean of the
    patches ("mean"), both concatenated ("both"), or means over cells of the image ("grid"; square images only). Also takes
    tokens (B, n, width) behind the frozen blocks in place of images.
    """

    cells: Tensor | None

    def __init__(self, vit: VisionTransformer, pos_embed: str = "dino", pool: str = "cls") -> None:
        super().__init__()
        self.vit = vit
        self.mode, self.pool = pos_embed, pool
        self.dim = vit.embed_dim * WIDTHS[pool]
        grid = mirrored_cell_weights(*vit.patch_embed.grid_size) if pool == "grid" else None
        self.register_buffer("cells", grid, persistent=False)  # of images of the size that the network was built for
        self.frozen = 0  # number of frozen lower blocks, which `lower` runs
        self.patch = int(vit.patch_embed.feat_ratio())  # pixels; with a hybrid's convolutions

    def forward(self, images: Tensor) -> Tensor:
        blocks = self.vit.blocks
        if self.pool != "cls" or self.frozen == len(blocks) or not is_plain_block(blocks[-1]):
            return self.embedding(self.tokens(images))
        tokens = images if images.ndim == 3 else self.lower(images)
        return self.vit.norm(class_token(blocks[-1], self.run(blocks[self.frozen : -1], tokens)))[:, 0]

    def run(self, blocks: Iterable[nn.Module], tokens: Tensor) -> Tensor:
        """Return the tokens (B, prefix + h w, width) behind these blocks of this network."""
        for block in blocks:
            tokens = block(tokens)
        return tokens

    def tokens(self, images: Tensor, masked: Tensor | None = None, stand_in: Tensor | None = None) -> Tensor:
        """Return the last block's tokens after the final norm, (B, prefix + h w, width), of images or tokens of `lower`.

        Patches where `masked` (B, h, w) is True are replaced by `stand_in` (width,) plus their position embedding.
        """
        tokens = images if images.ndim == 3 else self.lower(images)
        if masked is not None and stand_in is not None:
            first, (high, wide) = self.vit.num_prefix_tokens, masked.shape[1:]
            blank = (stand_in + self.positions(high, wide)[:, -high * wide :]).to(tokens.dtype)
            patches = torch.where(masked.flatten(1)[..., None], blank, tokens[:, first:])
            tokens = torch.cat([tokens[:, :first], patches], 1)
        return self.vit.norm(self.run(self.vit.blocks[self.frozen :], tokens))

    def embedding(self, tokens: Tensor) -> Tensor:
        """Return the embedding (B, D) of the tokens after the final norm."""
        return pool_tokens(tokens, self.pool, self.vit.num_prefix_tokens, self.cells)

    def lower(self, images: Tensor) -> Tensor:
        """Return the tokens (B, prefix + h w, width) of images behind the frozen blocks."""
        return self.run(self.vit.blocks[: self.frozen], self.embed(images))

    def freeze(self, blocks: int) -> "Backbone":
        """Freeze the patch embedding and the first `blocks` blocks. Raises LearnerError for too many."""
        if blocks > len(self.vit.blocks):
            raise LearnerError(f"frozen_blocks = {blocks}: this network has {len(self.vit.blocks)} blocks")
        self.frozen = blocks
        above = {id(p) for part in (self.vit.blocks[blocks:], self.vit.norm) for p in part.parameters()}
        for parameter in self.vit.parameters() if blocks else ():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in above)
        return self

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens (B, prefix + h w, D) of images before the first block."""
        vit = self.vit
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        patches = vit.patch_embed(images)  # (B, h, w, D)
        batch, high, wide, dim = patches.shape
        pos = self.positions(high, wide)
        patches = patches.reshape(batch, high * wide, dim)
        prefix = [cast(Tensor, vit.cls_token).expand(batch, -1, -1)]
        if vit.reg_token is not None:
            prefix.append(vit.reg_token.expand(batch, -1, -1))
        if vit.no_embed_class:
            tokens = torch.cat([*prefix, patches + pos], dim=1)
        else:
            tokens = torch.cat([*prefix, patches], dim=1) + pos
        return vit.norm_pre(vit.pos_drop(tokens))

    def positions(self, high: int, wide: int) -> Tensor:
        """Return the position embeddings of a grid of high x wide patches: (1, n, D)."""
        prefix = 0 if self.vit.no_embed_class else self.vit.num_prefix_tokens
        table = cast(Tensor, self.vit.pos_embed)
        return resample_pos_embed(table, self.vit.patch_embed.grid_size, (high, wide), prefix, self.mode)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Load weights with timm's key names."""
        self.vit.load_state_dict(weights)

    def attentions(self, images: Tensor) -> list[Tensor]:
        """Return the attention of every block, first to last: each (B, heads, tokens, tokens)."""
        tokens, attentions = self.embed(images), []
        for block in cast(nn.Sequential, self.vit.blocks):
            query, key, _ = self.heads(block, tokens)
            attentions.append((query @ key.transpose(-2, -1)).softmax(-1))
            tokens = self.run([block], tokens)
        return attentions

    def heads(self, block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query (scaled), key and value of a block's attention: each (B, heads, tokens, width of a head)."""
        attention = cast(Attention, block.attn)
        packed = attention.qkv(cast(Block, block).norm1(tokens)).unflatten(
            -1, (3, attention.num_heads, attention.head_dim)
        )
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        return attention.q_norm(query) * attention.scale, attention.k_norm(key), value

    def projection(self, block: nn.Module) -> Tensor:
        """Return the matrix (width, heads x head width) from the heads of a block's attention to what it adds to a token."""
        attention, scale = cast(Attention, block.attn), block.ls1
        weight = attention.proj.weight
        return scale.gamma[:, None] * weight if isinstance(scale, LayerScale) else weight

    def trace(self, images: Tensor) -> tuple[Tensor, Trace]:
        """Return the embedding (B, D) and the tensors that attribute it to patches."""
        vit, block = self.vit, self.vit.blocks[-1]
        tokens = self.run(vit.blocks[:-1], self.embed(images))
        query, key, value = self.heads(block, tokens)
        attention = (query[:, :, :1] @ key.transpose(-2, -1)).softmax(-1)  # (B, heads, 1, tokens)
        # the class token alone needs no patches behind the last block: saves a fourteenth of the arithmetic
        token_only = self.pool == "cls" and is_plain_block(block)
        if token_only:
            last = finish_block(cast(Block, block), tokens[:, :1], attention @ value)
        else:
            last = self.run([block], tokens)
        normed, first = vit.norm(last), vit.num_prefix_tokens
        grid = (images.shape[-2] // self.patch, images.shape[-1] // self.patch)
        return self.embedding(normed), Trace(
            self.pool, cast(nn.LayerNorm, vit.norm), self.projection(block), last[:, 0], normed[:, first:],
            attention[:, :, 0], value, grid, self.cells,
        )  # fmt: skip


def resample_pos_embed(table: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int, mode: str) -> Tensor:
    """Return position embeddings (1, prefix + old, D) resampled to grid `new`: (1, prefix + new, D).

    "dino": bicubic with scale (new + .1) / old, as DINO's interpolate_pos_encoding; "timm": antialiased bicubic.
    """
    if old == new:
        return table
    if mode == "timm":
        return resample_abs_pos_embed(table, new_size=list(new), old_size=list(old), num_prefix_tokens=prefix)
    head, grid = table[:, :prefix], table[:, prefix:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])  # as DINO: .1 avoids a grid that is rounded down
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    return torch.cat([head, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
