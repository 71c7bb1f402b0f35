"""Families of pretrained networks: how a file's tensor names show the family, and how they become timm's names.

A table: each row holds the marks of a family, the tensors that an encoder never needs, and the new names.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from learner.errors import LearnerError
from learner.networks.architecture import Plan, infer_plan

Tensors = dict[str, Tensor]


def _unchanged(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Family:
    """One row of the table; patterns are regular expressions that are searched in names without the network's prefix."""

    name: str
    anchor: str  # a tensor that each file of the family has; what stands before this name is the network's prefix
    marks: tuple[str, ...]  # patterns; each must match a tensor
    set_aside: tuple[str, ...]  # patterns of tensors that the encoder never needs: heads, decoders, mask tokens
    rename: tuple[tuple[str, str], ...] = ()  # pattern and replacement, in this order
    convert: Callable[[Tensors], Tensors] = _unchanged  # of values, after the renaming
    plan: Callable[[Tensors, dict[str, str], str], Plan] = infer_plan
    shape: tuple[int, ...] | None = None  # of the anchor, where names alone do not tell the family
    mean: tuple[float, ...] | None = None  # only where the family's own library prepares all images in one way
    std: tuple[float, ...] | None = None
    image_size: int | None = None  # pixels; where the plan has no image size


# of no family: what training leaves in a checkpoint beside the network
TRAINING_STATE = (r"^(optimizer|lr_scheduler|scheduler|scaler|fp16_scaler)\.", r"^(dino|ibot)_loss\.", r"^student\.")
CLASSIFIER = r"^(head|classifier)\.(weight|bias)$"
DINO_HEADS = r"(^|\.)((dino|ibot)_)?head\.(mlp|last_layer)\."


def _with_registers(tensors: Tensors) -> Tensors:
    """Add the class token's position to the class token: timm has positions of patches only beside registers."""
    if "register_tokens" not in tensors or not {"pos_embed", "cls_token"} <= tensors.keys():
        return tensors
    made = {key: value for key, value in tensors.items() if key != "register_tokens"}
    made["reg_token"] = tensors["register_tokens"]
    made["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
    made["pos_embed"] = tensors["pos_embed"][:, 1:]
    return made


def _joined_attention(tensors: Tensors) -> Tensors:
    """Concatenate query, key and value, in this order, to timm's `qkv`."""
    made = dict(tensors)
    for key in tensors:
        if (match := re.fullmatch(r"(blocks\.\d+\.attn\.)q(\.weight|\.bias)", key)) is None:
            continue
        parts = [f"{match[1]}{part}{match[2]}" for part in "qkv"]
        if all(part in tensors for part in parts):
            made[f"{match[1]}qkv{match[2]}"] = torch.cat([made.pop(part) for part in parts])
    return _with_registers(made)


def _eva_names(tensors: Tensors) -> Tensors:
    """Join the gate and the value of the MLP where no norm follows, and name the biases as timm does."""
    made = dict(tensors)
    for key in tensors:
        block, _, rest = key.rpartition(".attn.")
        if rest in ("q_bias", "v_bias") and f"{block}.attn.q_proj.weight" in tensors:
            made[f"{block}.attn.{rest[0]}_proj.bias"] = made.pop(key)
        block, _, rest = key.rpartition(".mlp.fc1_g.")
        gate, value = key, f"{block}.mlp.fc1_x.{rest}"
        if rest and value in tensors and f"{block}.mlp.norm.weight" not in tensors:
            made[f"{block}.mlp.fc1.{rest}"] = torch.cat([made.pop(gate), made.pop(value)])
    return made


def _eva_plan(tensors: Tensors, note: dict[str, str], name: str) -> Plan:
    """Return the plan of an EVA-02 network from the shapes of its weights; the grid of its positions is the reference."""
    try:
        dim, patch = tensors["cls_token"].shape[-1], tensors["patch_embed.proj.weight"].shape[-1]
        hidden, positions = tensors["blocks.0.mlp.fc2.weight"].shape[1], tensors["pos_embed"].shape[1] - 1
    except KeyError as error:
        raise LearnerError(f"backbone {name}: no tensor {error}: not an EVA-02 network") from None
    side = isqrt(positions)
    if side * side != positions:
        raise LearnerError(f"backbone {name}: {positions} position embeddings are not a square grid")
    return {
        "eva": True, "img_size": side * patch, "patch_size": patch, "embed_dim": dim,
        "depth": 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks.")),
        "num_heads": int(note.get("num_heads", max(1, dim // 64))),
        "mlp_ratio": (hidden + 0.5) / dim,  # timm rounds the product down
        "qkv_fused": "blocks.0.attn.qkv.weight" in tensors, "scale_mlp": "blocks.0.mlp.norm.weight" in tensors,
        "ref_feat_shape": [side, side],
    }  # fmt: skip


def _grey_input(tensors: Tensors) -> Tensors:
    """Spread the first convolution over three equal channels, a third each: the same output for a grey image."""
    first = "features.conv0.weight"
    return {**tensors, first: tensors[first].expand(-1, 3, -1, -1) / 3} if first in tensors else tensors


def _densenet_plan(tensors: Tensors, note: dict[str, str], name: str) -> Plan:
    return {"timm": "densenet121"}


HUGGING_FACE_NAMES = (
    (r"^embeddings\.(cls_token|register_tokens)$", r"\1"), (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."), (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".attn.\1."), (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."), (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)  # fmt: skip
EVA_NAMES = (
    (r"\.mlp\.ffn_ln\.", ".mlp.norm."), (r"\.attn\.inner_attn_ln\.", ".attn.norm."), (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."), (r"\.mlp\.w2\.", ".mlp.fc1_x."), (r"\.mlp\.w3\.", ".mlp.fc2."),
)  # fmt: skip

# The first family whose marks all match counts.
FAMILIES = (
    Family(
        "Hugging Face Dinov2", "embeddings.cls_token",
        (r"^encoder\.layer\.0\.attention\.(attention\.query|q_proj)\.weight$", r"^encoder\.layer\.0\.layer_scale1\.lambda1$"),
        (r"^embeddings\.mask_token$", CLASSIFIER), HUGGING_FACE_NAMES, _joined_attention,
    ),
    Family(
        "torchxrayvision DenseNet-121", "features.conv0.weight",
        (r"^features\.denseblock4\.denselayer16\.conv2\.weight$",),
        (CLASSIFIER, r"^op_threshs$"), (), _grey_input, _densenet_plan, (64, 1, 7, 7),  # one input channel
        (0.5,), (0.5 / 1024,), 224,  # its library scales grey levels to [-1024, 1024] and images to 224 px
    ),
    Family(
        "EVA-02 (also EVA-X)", "cls_token", (r"^blocks\.0\.attn\.(q_bias|q_proj\.bias)$", r"^patch_embed\.proj\.weight$"),
        (r"^mask_token$", r"^lm_head\.(weight|bias)$", r"(^|\.)rope\.", CLASSIFIER), EVA_NAMES, _eva_names, _eva_plan,
    ),
    Family(
        "MAE (also MedMAE)", "cls_token", (r"^decoder_embed\.weight$", r"^blocks\.0\.attn\.qkv\.weight$"),
        (r"^decoder_", r"^mask_token$"),
    ),
    Family(
        "DINOv2 with registers", "cls_token", (r"^register_tokens$", r"^blocks\.0\.ls1\.gamma$"),
        (r"^mask_token$", DINO_HEADS), (), _with_registers,
    ),
    Family(
        "DINOv2", "cls_token", (r"^mask_token$", r"^blocks\.0\.ls1\.gamma$"), (r"^mask_token$", DINO_HEADS),
    ),
    Family("DINO", "cls_token", (r"^blocks\.0\.attn\.qkv\.weight$", DINO_HEADS), (DINO_HEADS,)),
    Family("timm ViT", "cls_token", (r"^blocks\.0\.attn\.qkv\.weight$",), (CLASSIFIER,)),
)  # fmt: skip


def recognise(tensors: Tensors) -> tuple[Family, str] | None:
    """Return the family of these tensors and the prefix of the network's names; None for no family of the table."""
    for family in FAMILIES:
        if (prefix := prefix_of(family.anchor, tensors)) is None:
            continue
        if family.shape and tuple(tensors[prefix + family.anchor].shape) != family.shape:
            continue
        names = [key.removeprefix(prefix) for key in tensors]  # also those beside the network, such as a DINO head
        if all(any(re.search(mark, name) for name in names) for mark in family.marks):
            return family, prefix
    return None


def prefix_of(anchor: str, tensors: Tensors) -> str | None:
    """Return what stands before `anchor` in the tensors' names, None where no tensor has that name.

    Of several networks in one file the teacher's counts, else the one with the shortest prefix.
    """
    prefixes = [key.removesuffix(anchor) for key in tensors if key == anchor or key.endswith("." + anchor)]
    return min(prefixes, key=lambda prefix: ("teacher" not in prefix, len(prefix)), default=None)
