"""Device, number of threads, determinism and autocast type of a process, from the recipe's keys."""

import os

import torch

from learner.engine import distributed
from learner.errors import LearnerError
from learner.round.recipe import Recipe


def prepare_device(recipe: Recipe) -> tuple[torch.device, torch.dtype | None]:
    """Set threads and determinism; return the device and the dtype of autocast (None = off). Raises LearnerError."""
    local_rank, local_size = distributed.local_rank_and_size()
    torch.set_num_threads(recipe.threads or max(1, (os.cpu_count() or 1) // local_size))
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise LearnerError('device = "cuda": torch sees no GPU here; check the driver or set device = "auto"')
    if recipe.device == "cpu" or not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)  # only on the CPU are resumed rounds equal bit for bit
        return torch.device("cpu"), torch.bfloat16 if recipe.precision == "bf16" else None
    if local_size > torch.cuda.device_count():
        raise LearnerError(
            f"{local_size} processes on {torch.cuda.device_count()} GPUs; start one process for each GPU"
        )
    torch.cuda.set_device(local_rank)
    torch.set_float32_matmul_precision("high")
    half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.device("cuda", local_rank), None if recipe.precision == "fp32" else half
