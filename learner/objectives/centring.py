"""The running means of a recipe: centres of the teacher's prototype and patch logits, and its mean class probabilities."""

from torch import nn

from learner.objectives.dino import DinoLoss
from learner.objectives.pseudo_targets import MeanPrediction
from learner.objectives.self_supervised import PatchLoss
from learner.round.recipe import Recipe


def make_centres(recipe: Recipe, findings: int) -> nn.ModuleDict:
    """Return the running means by name; a step calls `move(mean row)` of each with the mean of its rows."""
    centres = nn.ModuleDict()
    shape = (recipe.prototypes, recipe.student_temp, recipe.teacher_temp, recipe.centre_momentum)
    if recipe.prototypes:
        centres["dino"] = DinoLoss(*shape)
    if recipe.ibot:
        centres["ibot"] = PatchLoss(*shape)
    if recipe.align:
        centres["answer"] = MeanPrediction(findings)
    return centres
