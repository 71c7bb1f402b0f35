"""Backbones: any plain timm vision transformer or convolutional network as the encoder, by name or from a file.

A checkpoint stores a plan (`learner.networks.architecture`), from which `build` makes the network without hub or file.
"""

import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from timm.layers.attention import Attention
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import is_model_in_modules
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from learner.errors import LearnerError
from learner.networks.architecture import ARCH, Plan, infer_plan, plan_of, round_to_patch, timm_name
from learner.networks.attribution import Trace
from learner.networks.class_token import class_token, finish_block, is_plain_block
from learner.networks.convnet import ConvNet
from learner.round.recipe import Recipe

HUB_ERRORS = (OSError, RuntimeError)  # of huggingface_hub: offline, or no weights under that name
# timm modules whose networks are plain vision transformers
VIT_MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit")


class Backbone(nn.Module):
    """A vision transformer: images (B, 1 or 3, H, W), H and W multiples of its patch, to embeddings (B, D).

    The embedding is the class token ("cls", as published), the mean of the patches ("mean") or both concatenated ("both",
    D doubled). Also takes tokens (B, n, width) behind the frozen blocks in place of images.
    """

    def __init__(self, vit: VisionTransformer, pos_embed: str = "dino", pool: str = "cls") -> None:
        super().__init__()
        self.vit = vit
        self.mode, self.pool = pos_embed, pool
        self.dim = vit.embed_dim * (2 if pool == "both" else 1)
        self.frozen = 0  # number of frozen lower blocks, which `lower` runs
        self.patch = int(vit.patch_embed.feat_ratio())  # pixels; with a hybrid's convolutions

    def forward(self, images: Tensor) -> Tensor:
        if self.pool != "cls" or self.frozen == len(self.vit.blocks):
            return self.embedding(self.tokens(images))
        tokens, blocks = images if images.ndim == 3 else self.lower(images), self.vit.blocks
        return self.vit.norm(class_token(blocks[-1], blocks[self.frozen : -1](tokens)))[:, 0]

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
        return self.vit.norm(self.vit.blocks[self.frozen :](tokens))

    def embedding(self, tokens: Tensor) -> Tensor:
        """Return the embedding (B, D) of the tokens after the final norm."""
        if self.pool == "cls":
            return tokens[:, 0]
        mean = tokens[:, self.vit.num_prefix_tokens :].mean(1)
        return mean if self.pool == "mean" else torch.cat([tokens[:, 0], mean], 1)

    def lower(self, images: Tensor) -> Tensor:
        """Return the tokens (B, prefix + h w, width) of images behind the frozen blocks."""
        return self.vit.blocks[: self.frozen](self.embed(images))

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
            query, key, _ = self._qkv(cast(Block, block), tokens)
            attentions.append((query @ key.transpose(-2, -1)).softmax(-1))
            tokens = block(tokens)
        return attentions

    def _qkv(self, block: Block, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = cast(Attention, block.attn)
        packed = attention.qkv(block.norm1(tokens)).unflatten(-1, (3, attention.num_heads, attention.head_dim))
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, tokens, width of a head)
        return attention.q_norm(query) * attention.scale, attention.k_norm(key), value

    def trace(self, images: Tensor) -> tuple[Tensor, Trace]:
        """Return the embedding (B, D) and the tensors that attribute it to patches."""
        tokens, block = self.vit.blocks[:-1](self.embed(images)), cast(Block, self.vit.blocks[-1])
        query, key, value = self._qkv(block, tokens)
        attention = (query[:, :, :1] @ key.transpose(-2, -1)).softmax(-1)  # (B, heads, 1, tokens)
        # the class token alone needs no patches behind the last block: saves a fourteenth of the arithmetic
        token_only = self.pool == "cls" and is_plain_block(block)
        last = finish_block(block, tokens[:, :1], attention @ value) if token_only else block(tokens)
        normed = self.vit.norm(last)
        patches = normed[:, self.vit.num_prefix_tokens :]
        grid = (images.shape[-2] // self.patch, images.shape[-1] // self.patch)
        return self.embedding(normed), Trace(self.vit, self.pool, last[:, 0], patches, attention[:, :, 0], value, grid)


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


def build(plan: Plan, pos_embed: str = "dino", pool: str = "cls", drop_path: float = 0.0) -> Backbone | ConvNet:
    """Return a network of this plan with random weights; a convolutional network ignores the other arguments."""
    name = plan.get("timm")
    if name is None:
        arguments = {"num_classes": 0, "dynamic_img_size": True, "drop_path_rate": drop_path, **plan}
        return Backbone(VisionTransformer(**arguments), pos_embed, pool)
    own = {key: value for key, value in plan.items() if key != "timm"}
    return _wrapped(_created(name, drop_path_rate=drop_path, **own), name, pos_embed, pool)


def _created(name: str, pretrained: bool = False, **for_vit: Any) -> nn.Module:
    """Return a timm network without its classifier; a transformer also takes image size and stochastic depth."""
    if is_model_in_modules(timm_name(name), VIT_MODULES):
        return timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True, **for_vit)
    return timm.create_model(name, pretrained=pretrained, num_classes=0)


def _wrapped(net: nn.Module, name: str, pos_embed: str = "dino", pool: str = "cls") -> Backbone | ConvNet:
    """Return the timm network as a Backbone or a ConvNet. Raises LearnerError for networks of other kinds."""
    # subclasses (DeiT with its second token), other blocks and other last norms compute something else than Backbone
    plain = type(net) is VisionTransformer and is_plain_block(net.blocks[-1]) and isinstance(net.norm, nn.LayerNorm)
    if isinstance(net, VisionTransformer) and plain and net.cls_token is not None and net.pos_embed is not None:
        return Backbone(net, pos_embed, pool)
    return ConvNet(net, name)


@torch.no_grad()
def resized(trained: Backbone | ConvNet, plan: Plan, size: int) -> Backbone | ConvNet:
    """Return a copy with position embeddings resampled to images of `size` pixels, for the export."""
    if isinstance(trained, ConvNet):
        return deepcopy(trained)
    native = cast(Backbone, build({**plan, "img_size": size}, trained.mode, trained.pool))
    positions = trained.positions(size // trained.patch, size // trained.patch)
    native.load({**trained.vit.state_dict(), "pos_embed": positions})
    return native


def open_backbone(recipe: Recipe) -> tuple[Plan, dict[str, Tensor] | None]:
    """Return plan and weights of the recipe's backbone; None, with a warning, for "random". Raises LearnerError."""
    if recipe.backbone == "random":
        warnings.warn(
            f"no pretrained backbone: {recipe.arch} starts from random weights and will learn little from few images; "
            "give one with --backbone FILE",
            stacklevel=2,
        )
        return plan_of(recipe.arch, recipe.image_size), None
    if recipe.backbone.endswith(".safetensors") or Path(recipe.backbone).exists():
        return read_weights(Path(recipe.backbone), recipe.arch)
    return _from_hub(recipe.backbone)


def _from_hub(name: str) -> tuple[Plan, dict[str, Tensor]]:
    """Return plan and pretrained weights of a timm model from the hub. Raises LearnerError."""
    hint, model = "give a local file instead: --backbone FILE.safetensors", timm_name(name)
    if not timm.is_model(model):
        raise LearnerError(f'backbone = "{name}": no such file and no timm model of that name; {hint}')
    try:
        net = _created(model, pretrained=True)
    except HUB_ERRORS as error:
        reason = f"the hub can't be reached ({type(error).__name__})"
        raise LearnerError(f'backbone = "{name}": {reason}; {hint}') from error
    return {"timm": model}, timm_network(_wrapped(net, model)).state_dict()


def weights_of(backbone: "Backbone | ConvNet", plan: Plan) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the weights with timm's key names, and the file metadata that `read_weights` needs."""
    net = timm_network(backbone)
    note = {"timm": str(plan["timm"])} if "timm" in plan else {"num_heads": str(plan["num_heads"])}
    return {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}, note


def read_weights(path: Path, arch: str = "") -> tuple[Plan, dict[str, Tensor]]:
    """Return plan and float32 weights of a safetensors file with timm's key names. Raises LearnerError.

    The shapes give the plan of a vision transformer. Another network's timm name is in the file's metadata (`timm`), else
    in `arch`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            note = file.metadata() or {}
            weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise LearnerError(f"backbone {path}: can't be read ({error}); needs a .safetensors file") from None
    class_tokens = [key for key in weights if key.endswith("cls_token")]
    if class_tokens:
        weights = _without_prefix(min(class_tokens, key=len).removesuffix("cls_token"), weights)
        plan = infer_plan(weights, note, str(path))
    else:
        plan = {"timm": timm_name(note.get("timm", arch))}
        if ARCH.fullmatch(plan["timm"]) or not timm.is_model(plan["timm"]):
            raise LearnerError(
                f"backbone {path}: no cls_token, so no vision transformer with timm's key names, and no metadata "
                '`timm`; set the timm name, such as arch = "densenet121", or save the file with metadata `timm`'
            )
    expected = timm_network(build(plan)).state_dict()
    if not class_tokens:
        first = next(iter(expected))
        matches = [key for key in weights if key.endswith(first)]
        weights = _without_prefix(min(matches, key=len, default=first).removesuffix(first), weights)
    wrong = sorted(k for k in expected if k not in weights or weights[k].shape != expected[k].shape)
    if wrong:
        raise LearnerError(f"backbone {path}: {len(wrong)} tensors missing or of another shape, first {wrong[0]}")
    return plan, {key: weights[key] for key in expected}


def _without_prefix(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def timm_network(backbone: Backbone | ConvNet) -> nn.Module:
    """Return the wrapped timm network; the key names of weights are those of its state dict."""
    return backbone.vit if isinstance(backbone, Backbone) else backbone.net


def fit_sizes(recipe: Recipe, net: Backbone | ConvNet) -> Recipe:
    """Return the recipe with image sides that are multiples of the patch (256 becomes 252 for a patch of 14).

    Also replaces frozen_blocks = -1: all blocks but the last of a pretrained transformer, else 0. Warns of both changes.
    """
    image, local = round_to_patch(recipe.image_size, net.patch), round_to_patch(recipe.local_size, net.patch)
    if (image, local) != (recipe.image_size, recipe.local_size):
        warnings.warn(
            f"patch {net.patch}: image {recipe.image_size} -> {image} px, local {recipe.local_size} -> {local} px",
            stacklevel=2,
        )
    frozen = recipe.frozen_blocks
    if frozen < 0:
        blocks = len(net.vit.blocks) if isinstance(net, Backbone) and recipe.backbone != "random" else 1
        frozen = blocks - 1
        if frozen:
            warnings.warn(
                f"profile {recipe.profile}: the lower {frozen} of {blocks} blocks are frozen; a recipe file with "
                "frozen_blocks = 0 trains all",
                stacklevel=2,
            )
    return replace(recipe, image_size=image, local_size=local, frozen_blocks=frozen)
