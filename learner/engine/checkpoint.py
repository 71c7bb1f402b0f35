"""The state of a round on disk: one safetensors file, tensors and a JSON header, replaced whole.

Holds every number the next step depends on, so that a resumed round equals an uninterrupted one. Never pickles.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cxrloop.durable import write_atomic
from learner.engine.step import State
from learner.errors import LearnerError
from learner.networks.backbone import Plan
from learner.networks.heads import Network

CURSOR = ("phase", "step", "burst", "bursts", "micro", "watch", "notes")
CARRIED = ("micro", "notes")  # from a phase to the next
DISTILS = ("head.", "mask", "patch_head.")  # parts of a network that answer for self-distillation alone
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


def save_state(path: Path, state: State, header: dict[str, Any]) -> None:
    """Write networks, centres, optimiser and cursor; `header` is the caller's JSON."""
    tensors = _networks(state)
    for name, parameter in state.student.named_parameters():
        for moment in MOMENTS:
            if moment in state.optimiser.state.get(parameter, {}):
                tensors[f"optimiser.{moment}.{name}"] = state.optimiser.state[parameter][moment]
    cursor = {key: getattr(state, key) for key in CURSOR} | {"scaler": state.scaler.state_dict()}
    write_file(path, tensors, {**header, "cursor": cursor})


def load_state(path: Path, state: State) -> dict[str, Any]:
    """Put a saved state into a freshly made one of the same shapes; returns the caller's header."""
    tensors, header = read_file(path)
    load_networks(state, tensors)
    for name, parameter in state.student.named_parameters():
        saved = {m: tensors[f"optimiser.{m}.{name}"] for m in MOMENTS if f"optimiser.{m}.{name}" in tensors}
        if saved:
            state.optimiser.state[parameter] = {m: v.to(parameter.device, copy=True) for m, v in saved.items()}
    cursor = header.pop("cursor")
    for key in CURSOR:
        setattr(state, key, cursor[key])
    state.scaler.load_state_dict(cursor["scaler"])
    return header


def save_weights(path: Path, state: State, plan: Plan, findings: tuple[str, ...]) -> None:
    """The parent of a later round: networks and centres, with what it takes to rebuild them."""
    header = {"plan": plan, "findings": list(findings), "recipe": state.recipe.to_dict()}
    write_file(path, _networks(state), header | {key: getattr(state, key) for key in CARRIED})


def load_weights(path: Path, state: State) -> None:
    """Put the end of a phase into a freshly made state: networks, centres, and what a next phase and the card take on."""
    tensors, header = read_file(path)
    load_networks(state, tensors)
    for key in CARRIED:
        setattr(state, key, header.get(key, getattr(state, key)))


def _networks(state: State) -> dict[str, Tensor]:
    tensors = {f"student.{k}": v for k, v in state.student.state_dict().items()}
    tensors |= {f"teacher.{k}": v for k, v in state.teacher.state_dict().items()}
    tensors |= {f"centres.{k}": v for k, v in state.centres.state_dict().items()}
    return tensors | {f"extra.{k}": v for k, v in state.extra.items()}


def load_networks(state: State, tensors: dict[str, Tensor]) -> None:
    """Student, teacher, centres and whatever the recipe carries along; raises LearnerError."""
    _fill(state.student, tensors, "student.")
    _fill(state.teacher, tensors, "teacher.")
    _fill(state.centres, tensors, "centres.")
    device = next(state.student.parameters()).device
    state.extra = {k.removeprefix("extra."): v.to(device) for k, v in tensors.items() if k.startswith("extra.")}


def load_network(network: Network, tensors: dict[str, Tensor], prefix: str) -> None:
    """Load `prefix`ed tensors; raises LearnerError naming the first that doesn't fit.

    A part that distils, and of which there is no tensor as the network's earlier recipe had no use for it, stays.
    """
    unused = tuple(part for part in DISTILS if not any(key.startswith(prefix + part) for key in tensors))
    _fill(network, tensors, prefix, unused)


def _fill(module: nn.Module, tensors: dict[str, Tensor], prefix: str, stays: tuple[str, ...] = ()) -> None:
    for key, value in module.state_dict().items():
        if key.startswith(stays):
            continue
        saved = tensors.get(prefix + key)
        if saved is None or saved.shape != value.shape:
            had = "missing" if saved is None else f"of shape {list(saved.shape)}"
            raise LearnerError(f"{prefix}{key} is {had}, this recipe needs {list(value.shape)}; use the parent's sizes")
        value.copy_(saved)


def write_file(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    flat = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_atomic(path, save(flat, metadata={"header": json.dumps(header)}))


def read_file(path: Path, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (none unless wanted) and the caller's header; raises LearnerError for a file cut off or of another kind."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("header", "{}"))
            return {key: file.get_tensor(key) for key in (file.keys() if tensors else ())}, header
    except (SafetensorError, ValueError) as error:
        raise LearnerError(f"{path} is damaged ({error}); remove it, and what was in it is made again") from None


def read_header(path: Path, *keys: str) -> dict[str, Any]:
    """The caller's header; raises LearnerError where one of these keys isn't in it."""
    header = read_file(path, tensors=False)[1]
    if missing := [key for key in keys if key not in header]:
        raise LearnerError(f"{path} is no state of a round: it has no {missing[0]}")
    return header


assert {f.name for f in fields(State)} >= set(CURSOR)
