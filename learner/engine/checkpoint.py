"""Checkpoints of a round: one safetensors file with tensors and a JSON header, replaced atomically; no pickle.

A checkpoint holds everything the next step depends on, so a resumed round equals an uninterrupted one bit for bit.
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

CURSOR = ("phase", "step", "burst", "bursts", "micro", "watch", "notes")  # fields of State that the header holds
CARRIED = ("micro", "notes")  # fields of State that go on to the next phase
PROTOTYPE_PARTS = ("head.", "mask", "patch_head.")  # parameters that only self-distillation uses
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


def save_state(path: Path, state: State, header: dict[str, Any]) -> None:
    """Write networks, centres, optimiser and cursor; `header` holds more JSON values."""
    tensors = _networks(state)
    for name, parameter in state.student.named_parameters():
        for moment in MOMENTS:
            if moment in state.optimiser.state.get(parameter, {}):
                tensors[f"optimiser.{moment}.{name}"] = state.optimiser.state[parameter][moment]
    cursor = {key: getattr(state, key) for key in CURSOR} | {"scaler": state.scaler.state_dict()}
    write_file(path, tensors, {**header, "cursor": cursor})


def load_state(path: Path, state: State) -> dict[str, Any]:
    """Load a checkpoint into a new state of the same shapes; return the header without the cursor."""
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
    """Write networks and centres with plan, findings and recipe, as the parent of a later round."""
    header = {"plan": plan, "findings": list(findings), "recipe": state.recipe.to_dict()}
    write_file(path, _networks(state), header | {key: getattr(state, key) for key in CARRIED})


def load_weights(path: Path, state: State) -> None:
    """Load networks, centres and the carried fields of a finished phase into a new state."""
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
    """Load student, teacher, centres and extra tensors; raises LearnerError for missing tensors or other shapes."""
    _fill(state.student, tensors, "student.")
    _fill(state.teacher, tensors, "teacher.")
    _fill(state.centres, tensors, "centres.")
    device = next(state.student.parameters()).device
    state.extra = {k.removeprefix("extra."): v.to(device) for k, v in tensors.items() if k.startswith("extra.")}


def load_network(network: Network, tensors: dict[str, Tensor], prefix: str) -> None:
    """Load the tensors with this prefix; raises LearnerError with the first tensor that does not fit.

    Prototype heads that the file does not have keep their weights: an earlier recipe did not use them.
    """
    absent = tuple(part for part in PROTOTYPE_PARTS if not any(key.startswith(prefix + part) for key in tensors))
    _fill(network, tensors, prefix, absent)


def _fill(module: nn.Module, tensors: dict[str, Tensor], prefix: str, keep: tuple[str, ...] = ()) -> None:
    """Copy the tensors into the module; keys that start with one of `keep` stay."""
    for key, value in module.state_dict().items():
        if key.startswith(keep):
            continue
        saved = tensors.get(prefix + key)
        if saved is None or saved.shape != value.shape:
            problem = "missing" if saved is None else f"of shape {list(saved.shape)}"
            raise LearnerError(
                f"{prefix}{key} is {problem}, this recipe needs {list(value.shape)}; use the parent's sizes"
            )
        value.copy_(saved)


def write_file(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write tensors and JSON header to a safetensors file, atomically."""
    flat = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_atomic(path, save(flat, metadata={"header": json.dumps(header)}))


def read_file(path: Path, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors (none with `tensors=False`) and header of a file; raises LearnerError for a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("header", "{}"))
            return {key: file.get_tensor(key) for key in (file.keys() if tensors else ())}, header
    except (SafetensorError, ValueError) as error:
        raise LearnerError(f"{path} is damaged ({error}); remove it, and the round computes it again") from None


def read_header(path: Path, *keys: str) -> dict[str, Any]:
    """Return the header of a file; raises LearnerError where it lacks one of the keys."""
    header = read_file(path, tensors=False)[1]
    if missing := [key for key in keys if key not in header]:
        raise LearnerError(f"{path} is no checkpoint of a round: its header has no {missing[0]}")
    return header


assert {f.name for f in fields(State)} >= set(CURSOR)
