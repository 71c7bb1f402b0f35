"""What a round starts from: plan, initial weights and recipe, of its checkpoint, its parent or its backbone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from learner.engine import checkpoint
from learner.engine.init_weights import keep_parent_shapes
from learner.errors import LearnerError
from learner.networks.architecture import Plan
from learner.pretrained.depth import keep_lower_blocks
from learner.pretrained.reader import open_backbone
from learner.round.manifest import RoundManifest
from learner.round.recipe import Recipe


@dataclass(frozen=True)
class Start:
    """Plan of the network, weights of the backbone where it was opened, and the recipe with mean and std resolved."""

    plan: Plan
    weights: dict[str, Tensor] | None
    recipe: Recipe


def find_start(manifest: RoundManifest, header: Mapping[str, Any] | None) -> Start:
    """Return what a round starts from: of its checkpoint's header, else of the parent, else of the backbone.

    Raises LearnerError.
    """
    recipe, parent = manifest.recipe, manifest.parent_state
    earlier = dict(header) if header else checkpoint.read_header(parent, "plan") if parent else None
    if parent:
        recipe = keep_parent_shapes(recipe, checkpoint.read_header(parent, "recipe")["recipe"])
    if earlier:
        return Start(earlier["plan"], None, _with_earlier_scale(recipe, earlier.get("recipe", {})))
    opened = open_backbone(recipe)
    plan, tensors = keep_lower_blocks(opened.plan, opened.tensors, recipe.blocks)
    return Start(plan, tensors, _with_scale(recipe, opened.mean, opened.std))


def _with_scale(recipe: Recipe, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Recipe:
    """Return the recipe with the backbone's mean and std where it asks for them; channels become grey by their mean."""
    if recipe.normalise != "backbone" or not (mean and std):
        return recipe
    return recipe.override({"mean": sum(mean) / len(mean), "std": sum(std) / len(std)})


def _with_earlier_scale(recipe: Recipe, earlier: Mapping[str, Any]) -> Recipe:
    """Return the recipe with mean and std of the recipe before it, which took them from the same backbone."""
    if recipe.normalise != "backbone" or earlier.get("normalise") != "backbone":
        return recipe
    return recipe.override({"mean": earlier["mean"], "std": earlier["std"]})


def open_same_backbone(manifest: RoundManifest, plan: Plan) -> dict[str, Tensor] | None:
    """Return the weights of the backbone that the parent was trained from. Raises LearnerError for another one.

    Another content (SHA-256 of the tensors) is another backbone, and so is another plan.
    """
    opened = open_backbone(manifest.recipe)
    found, tensors = keep_lower_blocks(opened.plan, opened.tensors, plan.get("depth", 0))
    if found != plan:
        raise LearnerError(
            f"the parent is {plan}, the backbone {found}; use the backbone that the parent was trained from"
        )
    parent = checkpoint.read_header(manifest.parent_state, "recipe")["recipe"] if manifest.parent_state else {}
    first, now = parent.get("backbone_sha256", ""), opened.sha256 if manifest.recipe.backbone_sha256 else ""
    if first and now and first != now:
        raise LearnerError(
            f"the parent was trained from tensors with SHA-256 {first[:12]}, the backbone {manifest.recipe.backbone} has "
            f"{now[:12]}; use the backbone that the parent was trained from"
        )
    return tensors
