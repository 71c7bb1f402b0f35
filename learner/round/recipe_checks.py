"""Checks of a recipe: values outside their range, and keys that have no effect beside the other keys.

Each error names the key and a solution. Must not import `learner.round.recipe`, which imports this module.
"""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from learner.errors import RecipeError

CHOICES = {
    "pos_embed": ("dino", "timm"),
    "normalise": ("recipe", "backbone"),
    "pool": ("cls", "mean", "both", "grid"),
    "init": ("timm", "mimetic"),
    "correct_loss": ("mix", "ce"),
    "serve": ("student", "teacher"),
    "device": ("auto", "cpu", "cuda"),
    "precision": ("auto", "fp32", "bf16"),
    "method": ("distl", "evolve", "pseudo-label", "kd", "pretrain"),
    "targets": ("teacher", "graph", "blend", "none"),
    "agree": ("none", "teacher", "heads", "soft"),
    "centring": ("centre", "sinkhorn"),
    "refit": ("none", "linear", "graph", "pseudo"),
    "average": ("ema", "wise", "trained", "least", "all"),
    "balance": ("none", "effective"),
    "kd_strategy": ("base", "standard", "reversed", "defective", "self"),
}
# must not be negative: that would reverse the sign of a loss or of a step
WEIGHTS = ("lr_min", "weight_decay", "clip", "ibot", "koleo", "pseudo_weight", "label_weight", "replay", "rotate")
MAY_BE_ZERO = {
    "blocks", "local_views", "prototypes", "class_hidden", "correct_every", "freeze_last", "t0_steps", "warmup_epochs",
    "micro_batch", "seed", "threads", "checkpoint_seconds",
}  # fmt: skip
# Methods that use a key; a key that is not listed is used by all. A new method joins the lists of the keys that it uses.
_SELF_DISTILS = ("distl", "evolve", "pretrain")
USED_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("alpha", "correct_every", "correct_first", "correct_loss", "serve"), ("distl",)),
    **dict.fromkeys(
        ("lam", "freeze_last", "teacher_temp", "student_temp", "centre_momentum", "ema_base", "poison_teacher"),
        _SELF_DISTILS,
    ),
    **dict.fromkeys(("local_size", "local_views", "local_scale", "local_noise", "head_hidden", "bottleneck"), _SELF_DISTILS),
    **dict.fromkeys(("ibot", "koleo", "centring"), ("evolve", "pretrain")),
    **dict.fromkeys(
        ("targets", "pseudo_weight", "align", "agree", "thresholds", "neighbours", "components", "label_weight", "replay",
         "refit", "average", "blend"),
        ("evolve",),
    ),
    "balance": ("evolve", "pseudo-label", "kd", "pretrain"),
    "kappa": ("evolve", "pseudo-label"),
    "finetune_epochs": ("pseudo-label",),
    "kd_temperature": ("kd", "evolve"),
    **dict.fromkeys(("kd_teacher", "kd_strategy", "kd_alpha"), ("kd",)),
}  # fmt: skip
ANY_LOSS = "set one of lam, ibot, koleo above 0, or (evolve) targets to other than none, or label_weight above 0"


def check(recipe: Any) -> None:
    """Raise RecipeError for the first key of a `learner.round.recipe.Recipe` that is not allowed."""
    for key, allowed in CHOICES.items():
        if getattr(recipe, key) not in allowed:
            raise RecipeError(f'recipe: {key} = "{getattr(recipe, key)}": must be one of {", ".join(allowed)}')
    for f in fields(recipe):
        value = getattr(recipe, f.name)
        least = -1 if f.name in ("frozen_blocks", "blocks") else 0 if f.name in MAY_BE_ZERO else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise RecipeError(f"recipe: {f.name} = {value}: too small")
    for key in ("lam", "ema_base", "drop_path", "centre_momentum", "global_noise", "local_noise", "kappa", "kd_alpha"):
        if not 0 <= getattr(recipe, key) <= 1:
            raise RecipeError(f"recipe: {key} = {getattr(recipe, key)}: must lie in [0, 1]")
    for key in ("lr", "t0_lr", "std", "teacher_temp", "student_temp", "kappa", "kd_temperature"):
        if not getattr(recipe, key) > 0:
            raise RecipeError(f"recipe: {key} = {getattr(recipe, key)}: must be above 0")
    for key in WEIGHTS:
        if getattr(recipe, key) < 0:
            raise RecipeError(f"recipe: {key} = {getattr(recipe, key)}: must not be below 0")
    for key in ("global_scale", "local_scale"):
        low, high = getattr(recipe, key)
        if not 0 < low <= high <= 1:
            raise RecipeError(f"recipe: {key} = [{low}, {high}]: needs 0 < low <= high <= 1")
    if recipe.method == "distl" and recipe.centring != "centre":
        raise RecipeError(
            'recipe: centring = "sinkhorn": distl uses the moving average, as published; use evolve or pretrain'
        )
    if recipe.method == "distl" and recipe.balance != "none":
        raise RecipeError(
            f'recipe: balance = "{recipe.balance}": distl weighs all labels equally, as published; use evolve'
        )
    distils = recipe.method in ("distl", "pretrain") or (recipe.method == "evolve" and (recipe.lam or recipe.ibot))
    if recipe.prototypes < 2 and (distils or recipe.prototypes):
        raise RecipeError(
            f"recipe: prototypes = {recipe.prototypes}: {recipe.method} uses the DINO loss, which needs at least 2"
        )
    if recipe.local_views and recipe.local_size >= recipe.image_size:
        raise RecipeError(f"recipe: local_size {recipe.local_size} must be below image_size {recipe.image_size}")
    if recipe.serve != "student" and recipe.method != "distl":
        raise RecipeError(
            f'recipe: serve = "{recipe.serve}": {recipe.method} chooses the network itself; only distl has this key'
        )
    if recipe.method in ("evolve", "pretrain"):
        _check_effect(recipe)


def check_used(recipe: Any, before: Any, keys: Iterable[str]) -> None:
    """Raise RecipeError for the first of these keys that changes `before` to `recipe` and that the method does not use."""
    for key in keys:
        methods = USED_BY.get(key, CHOICES["method"])
        if recipe.method not in methods and getattr(recipe, key) != getattr(before, key):
            raise RecipeError(
                f"recipe: {key} = {getattr(recipe, key)!r}: {recipe.method} does not use this key; leave it out, or use "
                f"{' or '.join(methods)}"
            )


def _check_effect(recipe: Any) -> None:
    """Raise RecipeError for a key of `evolve` or `pretrain` that has no effect beside the other keys."""
    has_prototype_loss = recipe.lam or recipe.ibot
    rules = (
        (
            "targets",
            "none",
            recipe.method == "evolve",
            "pretrain learns from images alone; leave it out, or use evolve",
        ),
        (
            "replay",
            0.0,
            recipe.method == "evolve",
            "pretrain trains no class head to distil into; leave it out, or use evolve",
        ),
        ("align", False, recipe.targets == "teacher", 'it shifts the teacher\'s logits; set targets = "teacher"'),
        (
            "thresholds",
            False,
            recipe.targets == "graph",
            'it selects pseudo-labels of the graph; set targets = "graph"',
        ),
        ("refit", "none", recipe.refit != "pseudo" or recipe.targets == "blend", 'set targets = "blend"'),
        ("targets", "teacher", recipe.targets != "blend" or recipe.blend, "set blend = true"),
        ("centring", "centre", has_prototype_loss, "it balances prototypes; set lam or ibot above 0"),
    )
    for key, default, has_effect, solution in rules:
        if getattr(recipe, key) != default and not has_effect:
            raise RecipeError(f"recipe: {key} = {getattr(recipe, key)!r} has no effect here: {solution}")
    allowed = {"none": ("none",), "blend": ("none",), "teacher": ("none", "soft"), "graph": CHOICES["agree"]}[
        recipe.targets
    ]
    if recipe.agree not in allowed:
        raise RecipeError(
            f'recipe: agree = "{recipe.agree}" has no effect with targets = "{recipe.targets}": set targets = "graph"'
        )
    pseudo_labels = recipe.targets != "none" and recipe.pseudo_weight
    labels = recipe.label_weight if recipe.method == "evolve" else 0.0
    if not (pseudo_labels or has_prototype_loss or recipe.koleo or recipe.replay or labels):
        raise RecipeError(f"recipe: {recipe.method} has nothing to learn: {ANY_LOSS}")
