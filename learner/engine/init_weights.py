"""The first weights of a network: a backbone's as they were pretrained, else shaped or plain random ones; its shapes.

Knows the two networks of a state; where weights come from is the caller's.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from learner.engine.step import State
from learner.networks.mimetic_init import mimic_trained
from learner.round.recipe import Recipe

SHAPES = ("pool", "class_hidden", "pos_embed")  # of the network that answers
HEADS = ("prototypes", "head_hidden", "bottleneck")  # and of the one that distils


def keep_parent_shapes(recipe: Recipe, parent: Mapping[str, Any]) -> Recipe:
    """The recipe, going on from a network that another method's recipe made: its heads keep their shapes.

    Within one method a change of sizes isn't taken back, and loading the parent then says what doesn't fit.
    """
    if parent.get("method", "distl") == recipe.method:
        return recipe
    both = recipe.prototypes and parent.get("prototypes")
    keys = SHAPES + (HEADS if both else ())
    return recipe.override({key: parent[key] for key in keys if key in parent})


def from_weights(weights: dict[str, Tensor] | None) -> Callable[[State], None]:
    """Student := these weights of its backbone, None = shaped or plain random ones; the teacher copies it."""

    def start(state: State) -> None:
        student = state.student
        if weights:
            student.backbone.load(weights)
        elif state.recipe.init == "mimetic":
            mimic_trained(student.backbone)
        if weights or state.recipe.init == "mimetic":
            for layer in student.cls_head.mlp:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()  # DINO's .02 start keeps a three-layer head asleep for hundreds of steps
        state.teacher.load_state_dict(student.state_dict())

    return start


def copy_frozen_weights(state: State) -> None:
    """What no step of the student changes is the same in the teacher, as both see tokens of the same frozen blocks."""
    for mine, its in zip(state.student.parameters(), state.teacher.parameters(), strict=True):
        if not mine.requires_grad:
            its.data.copy_(mine.data)
