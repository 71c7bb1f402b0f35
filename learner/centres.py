"""Which running means a recipe carries: the teacher's centre of prototypes, of patches, and its mean answer."""

from torch import nn

from learner.distill import DinoLoss
from learner.recipe import Recipe
from learner.selfsup import PatchLoss
from learner.targets import MeanAnswer


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
        centres["answer"] = MeanAnswer(findings)
    return centres
