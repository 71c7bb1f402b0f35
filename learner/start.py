"""The first weights of a network: a backbone's as they were pretrained, else shaped or plain random ones.

Knows the two networks of a state; where weights come from is the caller's.
"""

from collections.abc import Callable

from torch import Tensor, nn

from learner.mimetic import mimic_trained
from learner.step import State


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
