"""Which running means a recipe carries: the teacher's centre of prototypes, of patches, and its mean answer."""

from torch import nn

from learner.objectives.dino import DinoLoss
from learner.objectives.pseudo_targets import MeanPrediction
from learner.objectives.self_supervised import PatchLoss
from learner.round.recipe import Recipe


def make_centres(recipe: Recipe, findings: int) -> nn.ModuleDict:
    """By name, each with `move(mean row)`, which a step calls with the rows of that name."""
    centres, shape = (
        nn.ModuleDict(),
        (recipe.prototypes, recipe.student_temp, recipe.teacher_temp, recipe.centre_momentum),
    )
    if recipe.prototypes:
        centres["dino"] = DinoLoss(*shape)
    if recipe.ibot:
        centres["ibot"] = PatchLoss(*shape)
    if recipe.align:
        centres["answer"] = MeanPrediction(findings)
    return centres
