"""What a process takes of its machine: threads, determinism, the device and the precision it computes in.

Knows the recipe's keys for them and nothing of a round.
"""

import os

import torch

from learner.engine import distributed
from learner.errors import LearnerError
from learner.round.recipe import Recipe


def prepare_device(recipe: Recipe) -> tuple[torch.device, torch.dtype | None]:
    """Threads, determinism, the device, and the type of autocast (None = off)."""
    place, beside = distributed.local_rank_and_size()
    torch.set_num_threads(recipe.threads or max(1, (os.cpu_count() or 1) // beside))
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise LearnerError('device = "cuda": torch sees no GPU here; check the driver or set device = "auto"')
    if recipe.device == "cpu" or not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)  # bitwise resume is promised on the CPU only
        return torch.device("cpu"), torch.bfloat16 if recipe.precision == "bf16" else None
    if beside > torch.cuda.device_count():
        raise LearnerError(f"{beside} processes and {torch.cuda.device_count()} GPUs on a machine: one GPU a process")
    torch.cuda.set_device(place)
    torch.set_float32_matmul_precision("high")
    half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.device("cuda", place), None if recipe.precision == "fp32" else half
