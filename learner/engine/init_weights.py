"""Initial weights of student and teacher: pretrained, mimetic or random; and the head shapes of a parent's recipe."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from learner.engine.step import State
from learner.networks.mimetic_init import mimic_trained
from learner.round.recipe import Recipe

CLASS_SHAPE_KEYS = ("pool", "class_hidden", "pos_embed", "blocks")  # recipe keys that shape backbone and class head
DINO_SHAPE_KEYS = ("prototypes", "head_hidden", "bottleneck")  # recipe keys that shape the DINO head


def keep_parent_shapes(recipe: Recipe, parent: Mapping[str, Any]) -> Recipe:
    """Return the recipe with the parent's shapes of backbone and class head: an earlier version's recipe had others.

    The shapes of the DINO head are the parent's where another method trained it. With the same method they stay as the
    recipe says; if they have changed, loading the parent raises LearnerError.
    """
    other = parent.get("method", "distl") != recipe.method
    both = other and recipe.prototypes and parent.get("prototypes")
    keys = CLASS_SHAPE_KEYS + (DINO_SHAPE_KEYS if both else ())
    return recipe.override({key: parent[key] for key in keys if key in parent})


def from_weights(weights: dict[str, Tensor] | None) -> Callable[[State], None]:
    """Return a function that loads these backbone weights into the student and copies it to the teacher.

    `weights` None: mimetic or random weights, as in the recipe's `init`.
    """

    def start(state: State) -> None:
        student = state.student
        if weights:
            student.backbone.load(weights)
        elif state.recipe.init == "mimetic":
            mimic_trained(student.backbone)
        if weights or state.recipe.init == "mimetic":
            for layer in student.cls_head.mlp:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()  # DINO's std of .02 is too small: a three-layer head would learn nothing for hundreds of steps
        state.teacher.load_state_dict(student.state_dict())

    return start


def copy_frozen_weights(state: State) -> None:
    """Copy the student's frozen parameters to the teacher: both read tokens of the same frozen blocks."""
    for student, teacher in zip(state.student.parameters(), state.teacher.parameters(), strict=True):
        if not student.requires_grad:
            teacher.data.copy_(student.data)
