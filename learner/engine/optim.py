"""Optimiser, schedules, gradient clipping and the EMA update.

Every schedule is an array over the steps of a phase, so that a resumed round reads the same value at the same step.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from learner.round.recipe import Recipe


@dataclass(frozen=True)
class Schedule:
    """Values of one phase for each step; `alpha` for each epoch."""

    lr: np.ndarray
    weight_decay: np.ndarray
    momentum: np.ndarray
    alpha: np.ndarray
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """Steps of the phase."""
        return len(self.lr)


def cosine_schedule(
    base: float, final: float, epochs: int, steps: int, warmup_epochs: int = 0, start: float = 0.0
) -> np.ndarray:
    """Return (epochs * steps,): linear warm-up from `start` to `base`, then half a cosine towards `final`.

    As in DINO's utils.cosine_scheduler; `steps` are those of an epoch.
    """
    warm = np.linspace(start, base, warmup_epochs * steps) if warmup_epochs else np.array([])
    rest = np.arange(epochs * steps - len(warm))
    return np.concatenate([warm, final + 0.5 * (base - final) * (1 + np.cos(np.pi * rest / max(1, len(rest))))])


def alpha_ramp(epochs: int) -> np.ndarray:
    """Return the weight of the self-training loss for each epoch e of E: 2 (e + 1) / E, as in DISTL's code."""
    return 2 * (np.arange(epochs) + 1) / epochs


def make_schedule(recipe: Recipe, epochs: int, steps: int, peak: float, batch: int) -> Schedule:
    """Return the schedules of a phase; `peak` is the learning rate for a batch of 16 and scales with `batch`."""
    warmup = min(recipe.warmup_epochs, epochs - 1)
    return Schedule(
        lr=cosine_schedule(peak * batch / 16, recipe.lr_min, epochs, steps, warmup),
        weight_decay=np.full(epochs * steps, recipe.weight_decay),
        momentum=cosine_schedule(recipe.ema_base, 1.0, epochs, steps),
        alpha=alpha_ramp(epochs) if recipe.alpha else np.ones(epochs),
        steps_per_epoch=steps,
    )


def param_groups(model: nn.Module) -> list[dict]:
    """Return two groups: parameters with two or more dimensions, with weight decay; biases and vectors without."""
    decayed, undecayed = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (undecayed if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]


def make_optimiser(model: nn.Module) -> torch.optim.AdamW:
    """Return a fused AdamW; `set_rates` sets its learning rate and weight decay before each step."""
    return torch.optim.AdamW(param_groups(model), lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def set_rates(optimiser: torch.optim.Optimizer, schedule: Schedule, step: int) -> None:
    """Set the learning rate of a step, and the weight decay of the first group."""
    for i, group in enumerate(optimiser.param_groups):
        group["lr"] = float(schedule.lr[step])
        if i == 0:
            group["weight_decay"] = float(schedule.weight_decay[step])


def clip_each(model: nn.Module, limit: float) -> list[Tensor]:
    """Clip the gradient of each parameter tensor to its own L2 norm `limit`, as DINO does; return the norms.

    Reads nothing back from a GPU, so the step does not wait for it.
    """
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norms = torch._foreach_norm(grads, 2)  # pyright: ignore[reportPrivateImportUsage]
    shrink = (limit / (torch.stack(norms) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, shrink.unbind())  # pyright: ignore[reportPrivateImportUsage]
    return list(norms)


def drop_prototype_gradient(model: nn.Module) -> None:
    """Remove the gradient of the prototype layer, so that neither the layer nor its Adam state changes."""
    for name, parameter in model.named_parameters():
        if "last_layer" in name:
            parameter.grad = None


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Set the teacher's parameters to m teacher + (1 - m) student, m = `momentum`."""
    averages: list[Tensor] = [*teacher.parameters()]
    values: list[Tensor] = [*student.parameters()]
    torch._foreach_lerp_(averages, values, 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]
