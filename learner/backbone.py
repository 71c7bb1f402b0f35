"""Any timm vision transformer as the encoder: built by name, by shape, or from a local safetensors file.

The only file that imports timm. It knows nothing of heads, losses or findings. A network is remembered as a *plan*,
a few JSON values from which it is rebuilt without the hub or the file it came from.
"""

import re
import warnings
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from timm.layers.attention import Attention
from timm.layers.layer_scale import LayerScale
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from learner.recipe import Recipe

Plan = dict[
    str, Any
]  # {"timm": hub name, ...} or {"embed_dim": ..., "depth": ..., ...}: arguments of VisionTransformer

SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # embedding width and heads
ARCH = re.compile(r"vit_(tiny|small|base)_patch(\d+)(?:_depth(\d+))?")


HUB_ERRORS = (OSError, RuntimeError)  # offline (huggingface_hub raises an OSError), or no weights under that name


class BackboneError(ValueError):
    """A backbone that can't be had: says which and what to do."""


class Backbone(nn.Module):
    """A vision transformer: grey or colour images (B, 1 or 3, H, W) of any multiple of its patch -> embedding (B, D).

    The embedding is the class token ("cls", as published) or the mean of the patches ("mean").
    """

    def __init__(self, vit: VisionTransformer, pos_embed: str = "dino", pool: str = "cls") -> None:
        super().__init__()
        self.vit = vit
        self.mode, self.pool = pos_embed, pool
        self.dim = vit.embed_dim
        self.patch: int = vit.patch_embed.patch_size[0]

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.vit.norm(self.vit.blocks(self.embed(images)))
        return tokens[:, self.vit.num_prefix_tokens :].mean(1) if self.pool == "mean" else tokens[:, 0]

    def embed(self, images: Tensor) -> Tensor:
        """Tokens before the first block: (B, prefix + h w, D)."""
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
        """Position embeddings for a grid of high x wide patches: (1, n, D)."""
        prefix = 0 if self.vit.no_embed_class else self.vit.num_prefix_tokens
        table = cast(Tensor, self.vit.pos_embed)
        return resample_pos_embed(table, self.vit.patch_embed.grid_size, (high, wide), prefix, self.mode)

    def attention(self, images: Tensor) -> Tensor:
        """Attention of the last block: (B, heads, tokens, tokens)."""
        query, key, _ = self._last_qkv(self.vit.blocks[:-1](self.embed(images)))
        return (query @ key.transpose(-2, -1)).softmax(-1)

    def _last_qkv(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block, attention = last_block(self.vit)
        packed = attention.qkv(block.norm1(tokens)).unflatten(-1, (3, attention.num_heads, attention.head_dim))
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, tokens, width of a head)
        return attention.q_norm(query) * attention.scale, attention.k_norm(key), value

    def trace(self, images: Tensor) -> tuple[Tensor, "Trace"]:
        """The embedding (B, D), and what is needed to say which patch brought what into it."""
        tokens = self.vit.blocks[:-1](self.embed(images))
        query, key, value = self._last_qkv(tokens)
        look = (query[:, :, :1] @ key.transpose(-2, -1)).softmax(-1)[:, :, 0]  # (B, heads, tokens)
        last = self.vit.blocks[-1](tokens)
        patches = self.vit.norm(last)[:, self.vit.num_prefix_tokens :]
        grid = (images.shape[-2] // self.patch, images.shape[-1] // self.patch)
        if self.pool == "mean":
            return patches.mean(1), Trace(self, patches, look, value, grid)
        return self.vit.norm(last)[:, 0], Trace(self, last[:, 0], look, value, grid)


class Trace:
    """One forward pass through the last block, kept to attribute a direction of the embedding to patches."""

    def __init__(self, of: Backbone, last: Tensor, look: Tensor, value: Tensor, grid: tuple[int, int]) -> None:
        self.of, self.last, self.look, self.value, self.grid = of, last, look, value, grid

    def along(self, directions: Tensor) -> Tensor:
        """Contribution of each patch along `directions` (B, F, D) of the embedding: (B, F, h, w); + speaks for it.

        With the mean of patches: the patch's own share. With a class token: what the patch says to it in the last
        attention, times the direction's gradient behind that (final LayerNorm, not the last MLP).
        """
        if self.of.pool == "mean":
            return (directions @ self.last.transpose(1, 2) / self.last.shape[1]).unflatten(-1, self.grid)
        norm = cast(nn.LayerNorm, self.of.vit.norm)
        block, attention = last_block(self.of.vit)
        centred = self.last - self.last.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        shape = (centred / spread)[:, None]
        back = directions * norm.weight
        back = back - back.mean(-1, keepdim=True) - shape * (back * shape).mean(-1, keepdim=True)
        through_norm = back / spread[:, None]  # (B, F, D)
        if isinstance(block.ls1, LayerScale):
            through_norm = through_norm * block.ls1.gamma
        heads, width = self.value.shape[1], self.value.shape[3]
        by_head = (through_norm @ attention.proj.weight).unflatten(-1, (heads, width))  # (B, F, heads, width)
        said = torch.einsum("bfhd,bhnd->bfhn", by_head, self.value)
        share = (said * self.look[:, None]).sum(2)[:, :, self.of.vit.num_prefix_tokens :]
        return share.unflatten(-1, self.grid)


def last_block(vit: VisionTransformer) -> tuple[Block, Attention]:
    """The last block and its attention."""
    block = cast(Block, vit.blocks[-1])
    return block, cast(Attention, block.attn)


def resample_pos_embed(table: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int, mode: str) -> Tensor:
    """A position table (1, prefix + old, D) on another grid; "dino" scales by (n + .1) / old, "timm" antialiases."""
    if old == new:
        return table
    if mode == "timm":
        return resample_abs_pos_embed(table, new_size=list(new), old_size=list(old), num_prefix_tokens=prefix)
    head, grid = table[:, :prefix], table[:, prefix:]
    grid = grid.reshape(1, *old, -1).permute(0, 3, 1, 2)
    scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])  # .1 against rounding down, as DINO does
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    return torch.cat([head, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def build(plan: Plan, pos_embed: str = "dino", pool: str = "cls", drop_path: float = 0.0) -> Backbone:
    """A network of this plan with random weights."""
    given = {"num_classes": 0, "dynamic_img_size": True, "drop_path_rate": drop_path, **plan}
    name = given.pop("timm", None)
    vit = timm.create_model(name, pretrained=False, **given) if name else VisionTransformer(**given)
    return Backbone(_checked(vit, name or "vit"), pos_embed, pool)


@torch.no_grad()
def at_size(trained: Backbone, plan: Plan, size: int) -> Backbone:
    """The same network whose native image is `size`: position embeddings resampled once, for the export."""
    native = build({**plan, "img_size": size}, trained.mode, trained.pool)
    weights = trained.vit.state_dict()
    grid = size // trained.patch
    native.vit.load_state_dict({**weights, "pos_embed": trained.positions(grid, grid)})
    return native


def open_backbone(recipe: Recipe) -> tuple[Plan, dict[str, Tensor] | None]:
    """The plan, and the pretrained weights (None = start at random, with a warning); raises BackboneError."""
    if recipe.backbone == "random":
        warnings.warn(
            f"no pretrained backbone: {recipe.arch} starts from random weights and will learn little from few films; "
            "give one with --backbone FILE",
            stacklevel=2,
        )
        return plan_of(recipe.arch, recipe.image_size), None
    if recipe.backbone.endswith(".safetensors") or Path(recipe.backbone).exists():
        return read_weights(Path(recipe.backbone))
    return _from_hub(recipe.backbone)


def plan_of(arch: str, image_size: int) -> Plan:
    """The plan of `vit_{tiny,small,base}_patchN[_depthM]` or of a timm name, native at this image size."""
    match = ARCH.fullmatch(arch)
    if match:
        dim, heads = SIZES[match[1]]
        patch, depth = int(match[2]), int(match[3] or 12)
        size = round_to(image_size, patch)
        return {"img_size": size, "patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": heads}
    if not timm.is_model(arch):
        near = timm.list_models(f"*{arch.split('_')[0]}*")[:3]
        raise BackboneError(f'arch = "{arch}": neither vit_{{tiny,small,base}}_patchN nor a timm model; near: {near}')
    return {"timm": arch}


def _from_hub(name: str) -> tuple[Plan, dict[str, Tensor]]:
    hint = "give a local file instead: --backbone FILE.safetensors"
    if not timm.is_model(name.removeprefix("timm/").split(":")[-1].removeprefix("timm/")):
        raise BackboneError(f'backbone = "{name}": no such file and no timm model of that name; {hint}')
    try:
        vit = timm.create_model(name, pretrained=True, num_classes=0, dynamic_img_size=True)
    except HUB_ERRORS as error:
        raise BackboneError(
            f'backbone = "{name}": the hub can\'t be reached ({type(error).__name__}); {hint}'
        ) from error
    return {"timm": name}, _checked(vit, name).state_dict()


def read_weights(path: Path) -> tuple[Plan, dict[str, Tensor]]:
    """Plan and weights (float32) of a safetensors file with timm's key names; raises BackboneError."""
    try:
        with safe_open(path, framework="pt") as file:
            note = file.metadata() or {}
            weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"backbone {path}: can't be read ({error}); needs a .safetensors file") from None
    marks = [key for key in weights if key.endswith("cls_token")]
    if not marks:
        raise BackboneError(f"backbone {path}: no cls_token: not a vision transformer with timm's key names")
    prefix = min(marks, key=len).removesuffix("cls_token")
    weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    plan = infer_plan(weights, note, str(path))
    wanted = build(plan).vit.state_dict()
    wrong = sorted(k for k in wanted if k not in weights or weights[k].shape != wanted[k].shape)
    if wrong:
        raise BackboneError(f"backbone {path}: {len(wrong)} tensors missing or of another shape, first {wrong[0]}")
    return plan, {key: weights[key] for key in wanted}


def infer_plan(weights: dict[str, Tensor], note: dict[str, str], name: str) -> Plan:
    """Read the architecture off the shapes; heads are 64 wide unless the file's metadata has `num_heads`."""
    try:
        dim = weights["cls_token"].shape[-1]
        patch = weights["patch_embed.proj.weight"].shape[-1]
        hidden, taken = weights["blocks.0.mlp.fc1.weight"].shape[0], weights["blocks.0.mlp.fc2.weight"].shape[1]
        places = weights["pos_embed"].shape[1]
    except KeyError as error:
        raise BackboneError(f"backbone {name}: no tensor {error}: not a plain vision transformer") from None
    if hidden != taken:
        raise BackboneError(f"backbone {name}: gated MLP (SwiGLU) isn't read from a file; give its timm name")
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    alone = isqrt(places) ** 2 == places  # a table without places for CLS and registers
    side = isqrt(places if alone else places - 1 - registers)
    if side * side + (0 if alone else 1 + registers) != places:
        raise BackboneError(f"backbone {name}: {places} position embeddings aren't a square grid")
    depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    return {
        "img_size": side * patch, "patch_size": patch, "embed_dim": dim, "depth": depth,
        "num_heads": int(note.get("num_heads", max(1, dim // 64))), "mlp_ratio": hidden / dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights, "reg_tokens": registers, "no_embed_class": alone,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in weights else None, "pre_norm": "norm_pre.weight" in weights,
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
    }  # fmt: skip


def _checked(vit: nn.Module, name: str) -> VisionTransformer:
    if not isinstance(vit, VisionTransformer) or vit.cls_token is None or vit.pos_embed is None:
        raise BackboneError(f'backbone = "{name}": needs a vision transformer with a class token and learned positions')
    return vit


def round_to(size: int, patch: int) -> int:
    """The multiple of the patch nearest to this image side, at least one patch."""
    return max(1, round(size / patch)) * patch


def fit_sizes(recipe: Recipe, patch: int) -> Recipe:
    """The recipe with image sides that this patch divides (256 becomes 252 for a patch of 14), with a warning."""
    whole, local = round_to(recipe.image_size, patch), round_to(recipe.local_size, patch)
    if (whole, local) != (recipe.image_size, recipe.local_size):
        warnings.warn(
            f"patch {patch}: image {recipe.image_size} -> {whole} px, local {recipe.local_size} -> {local} px",
            stacklevel=2,
        )
    return replace(recipe, image_size=whole, local_size=local)
