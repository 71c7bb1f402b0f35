"""The lower blocks of a pretrained transformer.

The last blocks of a network that was pretrained on photographs describe photographs. Features from two thirds of the
depth separate findings on chest X-rays better (bench/adults/features_study.py), and cost a third less.
"""

from torch import Tensor

from learner.errors import LearnerError
from learner.networks.architecture import Plan


def keep_lower_blocks(
    plan: Plan, weights: dict[str, Tensor] | None, blocks: int
) -> tuple[Plan, dict[str, Tensor] | None]:
    """Return plan and weights of the lowest blocks: `blocks` of them, 0 = all, -1 = two thirds.

    Random weights (None) and networks without `blocks.N.` in their tensor names stay whole. Raises LearnerError for more blocks than there are.
    """
    depth = 1 + max((int(key.split(".")[1]) for key in weights or () if key.startswith("blocks.")), default=-1)
    if not blocks or not depth or weights is None:
        return plan, weights
    kept = max(1, round(depth * 2 / 3)) if blocks == -1 else blocks
    if kept > depth:
        raise LearnerError(f"blocks = {blocks}: the backbone has {depth} blocks; use at most {depth}, or 0 for all")
    below = {key: value for key, value in weights.items() if not _is_above(key, kept)}
    return {**plan, "depth": kept}, below


def _is_above(key: str, kept: int) -> bool:
    return key.startswith("blocks.") and int(key.split(".")[1]) >= kept
