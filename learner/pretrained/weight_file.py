"""Files of weights: tensors, metadata and content hash of a safetensors file, or of a pickle without running its code."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from learner.errors import LearnerError
from learner.pretrained.families import Tensors
from learner.round.backbone_file import SUFFIX, content_hash, content_hash_of

PICKLES = (".pth", ".pt", ".bin", ".ckpt")  # suffixes of files that torch.save wrote


def read_tensors(path: Path) -> tuple[Tensors, dict[str, str], str]:
    """Return tensors (floating ones as float32), metadata and content hash of a file. Raises LearnerError.

    A file of torch.save is opened with `weights_only`, which runs no code: one that holds other objects is rejected.
    """
    if path.suffix in PICKLES:
        tensors, note = _read_pickle(path), {}
        sha256 = content_hash_of(save({key: value.clone().contiguous() for key, value in tensors.items()}))
    else:
        try:
            with safe_open(path, framework="pt") as file:
                note = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            sha256 = content_hash(path)
        except (OSError, SafetensorError) as error:
            raise LearnerError(f"backbone {path}: can't be read ({error}); needs a {SUFFIX} file") from None
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}, note, sha256


def _read_pickle(path: Path) -> Tensors:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO and MAE keep their options in one
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise LearnerError(
            f"backbone {path}: holds Python objects besides tensors; opening them could run any code. Where you trust the "
            "file's source, load it there with the library that made it, and save model.state_dict() with "
            "safetensors.torch.save_file"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise LearnerError(f"backbone {path}: can't be read ({error}); needs a {SUFFIX} file") from None
    tensors: Tensors = {}
    _flatten("", loaded, tensors)
    if not tensors:
        raise LearnerError(f"backbone {path}: holds no tensors")
    return tensors


def _flatten(name: str, value: Any, into: Tensors) -> None:
    """Collect the tensors of nested dicts under their joined keys."""
    if isinstance(value, Tensor):
        into[name] = value.detach()
    elif isinstance(value, dict):
        for key, inner in value.items():
            _flatten(f"{name}.{key}" if name else str(key), inner, into)
