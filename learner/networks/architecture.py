"""Plans: the JSON values from which `backbone.build` rebuilds a network; from a name, or from the shapes of tensors."""

import re
from math import isqrt
from typing import Any

import timm
from torch import Tensor

from learner.errors import LearnerError

Plan = dict[str, Any]  # {"timm": name, ...}, or {"embed_dim": ..., "depth": ..., ...}: arguments of VisionTransformer

SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # embedding width and heads
ARCH = re.compile(r"vit_(tiny|small|base)_patch(\d+)(?:_depth(\d+))?")


def timm_name(name: str) -> str:
    """Return a timm name without hub prefixes: `timm/resnet50.a1_in1k` -> `resnet50.a1_in1k`."""
    return name.removeprefix("timm/").split(":")[-1].removeprefix("timm/")


def plan_of(arch: str, image_size: int) -> Plan:
    """Return the plan of `vit_{tiny,small,base}_patchN[_depthM]` or of a timm name. Raises LearnerError for other names."""
    match = ARCH.fullmatch(arch)
    if match:
        dim, heads = SIZES[match[1]]
        patch, depth = int(match[2]), int(match[3] or 12)
        size = round_to_patch(image_size, patch)
        return {"img_size": size, "patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": heads}
    if not timm.is_model(arch):
        near = timm.list_models(f"*{arch.split('_')[0]}*")[:3]
        raise LearnerError(f'arch = "{arch}": neither vit_{{tiny,small,base}}_patchN nor a timm model; near: {near}')
    return {"timm": arch}


def infer_plan(weights: dict[str, Tensor], note: dict[str, str], name: str) -> Plan:
    """Return the plan of a vision transformer from the shapes of its weights; `name` is for error messages.

    Heads are 64 wide, unless the file's metadata `note` has `num_heads`. Raises LearnerError for other networks.
    """
    try:
        dim = weights["cls_token"].shape[-1]
        patch = weights["patch_embed.proj.weight"].shape[-1]
        hidden, hidden_in = weights["blocks.0.mlp.fc1.weight"].shape[0], weights["blocks.0.mlp.fc2.weight"].shape[1]
        positions = weights["pos_embed"].shape[1]
    except KeyError as error:
        raise LearnerError(f"backbone {name}: no tensor {error}: not a plain vision transformer") from None
    if hidden != hidden_in:
        raise LearnerError(f"backbone {name}: gated MLP (SwiGLU) is not supported in a file; give its timm name")
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    patches_only = isqrt(positions) ** 2 == positions  # no position embeddings for CLS and registers
    side = isqrt(positions if patches_only else positions - 1 - registers)
    if side * side + (0 if patches_only else 1 + registers) != positions:
        raise LearnerError(f"backbone {name}: {positions} position embeddings are not a square grid")
    depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    return {
        "img_size": side * patch, "patch_size": patch, "embed_dim": dim, "depth": depth,
        "num_heads": int(note.get("num_heads", max(1, dim // 64))), "mlp_ratio": hidden / dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights, "reg_tokens": registers, "no_embed_class": patches_only,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in weights else None, "pre_norm": "norm_pre.weight" in weights,
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
    }  # fmt: skip


def round_to_patch(size: int, patch: int) -> int:
    """Return the multiple of the patch side nearest to this image side, at least one patch."""
    return max(1, round(size / patch)) * patch
