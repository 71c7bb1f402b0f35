"""What a network is rebuilt from: a *plan*, a few JSON values, read off a name or off the shapes of a file's tensors.

Makes no network and reads no file; a plan that can't be had is refused with a reason and a way out.
"""

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
    """A timm name without the hub's prefixes: `timm/resnet50.a1_in1k` -> `resnet50.a1_in1k`."""
    return name.removeprefix("timm/").split(":")[-1].removeprefix("timm/")


def plan_of(arch: str, image_size: int) -> Plan:
    """The plan of `vit_{tiny,small,base}_patchN[_depthM]` or of a timm name, native at this image size."""
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
    """Read the architecture off the shapes; heads are 64 wide unless the file's metadata has `num_heads`."""
    try:
        dim = weights["cls_token"].shape[-1]
        patch = weights["patch_embed.proj.weight"].shape[-1]
        hidden, taken = weights["blocks.0.mlp.fc1.weight"].shape[0], weights["blocks.0.mlp.fc2.weight"].shape[1]
        places = weights["pos_embed"].shape[1]
    except KeyError as error:
        raise LearnerError(f"backbone {name}: no tensor {error}: not a plain vision transformer") from None
    if hidden != taken:
        raise LearnerError(f"backbone {name}: gated MLP (SwiGLU) isn't read from a file; give its timm name")
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    alone = isqrt(places) ** 2 == places  # a table without places for CLS and registers
    side = isqrt(places if alone else places - 1 - registers)
    if side * side + (0 if alone else 1 + registers) != places:
        raise LearnerError(f"backbone {name}: {places} position embeddings aren't a square grid")
    depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    return {
        "img_size": side * patch, "patch_size": patch, "embed_dim": dim, "depth": depth,
        "num_heads": int(note.get("num_heads", max(1, dim // 64))), "mlp_ratio": hidden / dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights, "reg_tokens": registers, "no_embed_class": alone,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in weights else None, "pre_norm": "norm_pre.weight" in weights,
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
    }  # fmt: skip


def round_to_patch(size: int, patch: int) -> int:
    """The multiple of the patch nearest to this image side, at least one patch."""
    return max(1, round(size / patch)) * patch
