"""The arithmetic around a step: schedules, parameter groups, clipping, the moving average.

Knows tensors and names of parameters, no loss and no image. Every schedule is an array over the steps of a phase, so a
resumed round reads the same number at the same step.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from learner.round.recipe import Recipe


@dataclass(frozen=True)
class Schedule:
    """Per-step values of one phase; `alpha` is per epoch."""

    lr: np.ndarray
    weight_decay: np.ndarray
    momentum: np.ndarray
    alpha: np.ndarray
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        return len(self.lr)


def cosine_schedule(
    base: float, final: float, epochs: int, steps: int, warmup_epochs: int = 0, start: float = 0.0
) -> np.ndarray:
    """(epochs * steps,): linear from `start` to `base` over the warm-up, then half a cosine that stops short of `final`."""
    warm = np.linspace(start, base, warmup_epochs * steps) if warmup_epochs else np.array([])
    rest = np.arange(epochs * steps - len(warm))
    return np.concatenate([warm, final + 0.5 * (base - final) * (1 + np.cos(np.pi * rest / max(1, len(rest))))])


def alpha_ramp(epochs: int) -> np.ndarray:
    """Weight of the self-training term by epoch: 2 (e + 1) / E."""
    return 2 * (np.arange(epochs) + 1) / epochs


def make_schedule(recipe: Recipe, epochs: int, steps: int, peak: float, batch: int) -> Schedule:
    """The schedules of a phase; the peak learning rate is given for 16 images and scales with the batch."""
    warmup = min(recipe.warmup_epochs, epochs - 1)
    return Schedule(
        lr=cosine_schedule(peak * batch / 16, recipe.lr_min, epochs, steps, warmup),
        weight_decay=np.full(epochs * steps, recipe.weight_decay),
        momentum=cosine_schedule(recipe.ema_base, 1.0, epochs, steps),
        alpha=alpha_ramp(epochs) if recipe.alpha else np.ones(epochs),
        steps_per_epoch=steps,
    )


def param_groups(model: nn.Module) -> list[dict]:
    """Weights of two and more dimensions are decayed (position and class token too), biases and vectors aren't."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed}, {"params": free, "weight_decay": 0.0}]


def make_optimiser(model: nn.Module) -> torch.optim.AdamW:
    """AdamW whose learning rate and decay are set at each step from the schedule; its whole step is one fused pass."""
    return torch.optim.AdamW(param_groups(model), lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def set_rates(optimiser: torch.optim.Optimizer, schedule: Schedule, step: int) -> None:
    """This step's learning rate, and its weight decay for the decayed group."""
    for i, group in enumerate(optimiser.param_groups):
        group["lr"] = float(schedule.lr[step])
        if i == 0:
            group["weight_decay"] = float(schedule.weight_decay[step])


def clip_each(model: nn.Module, limit: float) -> list[Tensor]:
    """Clip the gradient of every parameter tensor by its own L2 norm (not the global one); returns the norms.

    Nothing is read back from the device: on a GPU the step goes on without waiting.
    """
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norms = torch._foreach_norm(grads, 2)  # pyright: ignore[reportPrivateImportUsage]
    shrink = (limit / (torch.stack(norms) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, shrink.unbind())  # pyright: ignore[reportPrivateImportUsage]
    return list(norms)


def drop_prototype_gradient(model: nn.Module) -> None:
    """Throw away the gradient of the prototype layer, so that neither it nor its Adam state moves."""
    for name, parameter in model.named_parameters():
        if "last_layer" in name:
            parameter.grad = None


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- m teacher + (1 - m) student, over the parameters."""
    old: list[Tensor] = [*teacher.parameters()]
    new: list[Tensor] = [*student.parameters()]
    torch._foreach_lerp_(old, new, 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]
