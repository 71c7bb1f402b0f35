"""A training state and a batch small enough for single steps in tests, and a backbone that runs out of memory."""

import numpy as np
import torch

from learner.engine.optim import Schedule, make_optimiser
from learner.engine.step import Batch, State
from learner.networks.heads import make_network
from learner.objectives.dino import DinoLoss
from learner.round.recipe import resolve
from tests.support.learner.round_folders import TINY

PLAN = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
STEPS = 60


def make_state(**overrides):
    """Return a float64 state with constant schedules."""
    recipe = resolve("distl", "demo", {**TINY, "batch": 4, "drop_path": 0.0, **overrides})
    torch.manual_seed(0)
    student, teacher = make_network(PLAN, recipe, 2).double(), make_network(PLAN, recipe, 2).double()
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    flat = np.full(STEPS, 1e-3)
    schedule = Schedule(flat, flat * 0, np.full(STEPS, 0.9), np.ones(STEPS), steps_per_epoch=1)
    centres = torch.nn.ModuleDict({"dino": DinoLoss(recipe.prototypes, 0.1, 0.04, 0.9)}).double()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return State(student, teacher, make_optimiser(student), schedule, recipe, scaler, centres)


def centre(state):
    """Return the centre of the DINO loss."""
    return state.centres["dino"].centre


def make_batch(samples=4, labels=None):
    """Return a batch of random views: two of 16 pixels, two of 8."""
    torch.manual_seed(1)
    views = [torch.rand(samples, 1, side, side).double() for side in (16, 16, 8, 8)]
    return Batch(samples, lambda part: [v[part] for v in views], labels)


class Endless:
    """A feed that returns the same batch for every step."""

    def __init__(self, batch, batches=1):
        self.only, self.batches = batch, batches

    def batch(self, epoch, index):
        return self.only


def parameters(network):
    """Return all parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in network.parameters()])


class LimitedMemory(torch.nn.Module):
    """A backbone that calls `full` for more than `room` images in a forward pass."""

    def __init__(self, backbone, room, full):
        super().__init__()
        self.inner, self.room, self.full = backbone, room, full

    def forward(self, images):
        if len(images) > self.room:
            self.full()
        return self.inner(images)


def device_is_full():
    raise torch.OutOfMemoryError("no room")


def machine_is_full():
    torch.empty(1 << 60)  # an exabyte: torch raises its own error


def limit_memory(state, room, full=device_is_full):
    state.student.backbone = LimitedMemory(state.student.backbone, room, full)
