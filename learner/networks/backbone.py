"""Backbones: a plain vision transformer, an EVA-02 transformer or a convolutional network of timm as the encoder.

A checkpoint stores a plan (`learner.networks.architecture`), from which `build` makes the network without hub or file.
`learner.pretrained.reader` reads weights.
"""

import warnings
from copy import deepcopy
from dataclasses import replace
from typing import Any, cast

import timm
import torch
from timm.models import is_model_in_modules
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from learner.networks.architecture import Plan, round_to_patch, timm_name
from learner.networks.class_token import is_plain_block
from learner.networks.convnet import ConvNet
from learner.networks.eva import EvaBackbone, is_eva_02
from learner.networks.vit import Backbone
from learner.round.recipe import Recipe

# timm modules whose networks are plain vision transformers
VIT_MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit")
# keys of timm's Eva that make it give normed tokens, as a vision transformer does, in place of a normed mean
EVA_TOKENS = {"use_post_transformer_norm": True, "use_fc_norm": False}


def build(plan: Plan, pos_embed: str = "dino", pool: str = "cls", drop_path: float = 0.0) -> Backbone | ConvNet:
    """Return a network of this plan with random weights; a convolutional network ignores the other arguments."""
    own = {key: value for key, value in plan.items() if key not in ("timm", "eva")}
    if "timm" in plan:
        return _wrapped(timm_model(plan["timm"], drop_path_rate=drop_path, **own), plan["timm"], pos_embed, pool)
    arguments = {"num_classes": 0, "dynamic_img_size": True, "drop_path_rate": drop_path, **own}
    if plan.get("eva"):
        eva = Eva(**EVA_TOKENS, swiglu_mlp=True, use_rot_pos_emb=True, **arguments)
        return _wrapped(eva, "eva", pos_embed, pool)
    return Backbone(VisionTransformer(**arguments), pos_embed, pool)


def timm_model(name: str, **for_vit: Any) -> nn.Module:
    """Return a timm network without its classifier; a transformer also takes image size and stochastic depth."""
    model = timm_name(name)
    if is_model_in_modules(model, VIT_MODULES):
        return timm.create_model(name, num_classes=0, dynamic_img_size=True, **for_vit)
    if is_model_in_modules(model, ("eva",)):
        return timm.create_model(name, num_classes=0, dynamic_img_size=True, **EVA_TOKENS, **for_vit)
    return timm.create_model(name, num_classes=0)


def _wrapped(net: nn.Module, name: str, pos_embed: str = "dino", pool: str = "cls") -> Backbone | ConvNet:
    """Return the timm network as a Backbone or a ConvNet. Raises LearnerError for networks of other kinds."""
    if is_eva_02(net):
        return EvaBackbone(net, pos_embed, pool)
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
