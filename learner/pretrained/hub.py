"""Download of pretrained weights from the Hugging Face hub: models that timm knows, and any repository's weight file.

Needs a route to the hub, or its cache on this machine; `HF_ENDPOINT` names another server.
"""

import json
import os
from pathlib import Path
from typing import Any

import httpx
import timm
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from learner.errors import LearnerError
from learner.networks.architecture import timm_name

WEIGHTS = "model.safetensors"
CONFIG = "preprocessor_config.json"  # of transformers: mean, std and image size
HINT = "give a local file instead: --backbone FILE.safetensors"
HUB_ERRORS = (OSError, httpx.HTTPError, EntryNotFoundError)  # offline, refused, or no such file
# What publishers state elsewhere than in the repository: https://github.com/hustvl/EVA-X, the licence in its README, mean
# and std in its code for fine-tuning (classification/utils/datasets.py)
STATED = {"MapleF/eva_x": {"licence": "mit", "mean": "[0.49185243]", "std": "[0.28509309]"}}


def download(name: str) -> tuple[Path, str, dict[str, str]]:
    """Return the file of a model, "", and what the hub or timm states about it. Raises LearnerError.

    `name`: a timm name, or OWNER/REPOSITORY with the file in it (OWNER/REPOSITORY/FILE) where that is not model.safetensors.
    """
    model = timm_name(name)
    if timm.is_model(model):
        config = timm.get_pretrained_cfg(model)
        if config is None or not config.hf_hub_id:
            raise LearnerError(f'backbone = "{name}": timm has no weights of this model on the hub; {HINT}')
        tag = f".{config.tag}" if config.tag else ""
        stated = {
            "timm": model.split(".")[0] + tag,
            "licence": config.license,
            "image_size": str(config.input_size[-1]),
        }
        stated |= {"mean": json.dumps(list(config.mean)), "std": json.dumps(list(config.std))}
        repository, file = config.hf_hub_id, config.hf_hub_filename or WEIGHTS
        path = _file(name, repository, file)
    elif name.count("/") and not name.startswith(("/", ".")):
        owner, repository, *inner = name.split("/")
        repository, file = f"{owner}/{repository}", "/".join(inner) or WEIGHTS
        path = _file(name, repository, file)
        stated = _stated(repository) | STATED.get(repository, {})
    else:
        raise LearnerError(f'backbone = "{name}": no such file and no timm model of that name; {HINT}')
    return path, "", {key: value for key, value in stated.items() if value} | {"source": f"{repository}/{file}"}


def _endpoint() -> str | None:
    """Return the server that takes the hub's place, None for the hub."""
    return os.environ.get("HF_ENDPOINT") or None


def _file(name: str, repository: str, file: str) -> Path:
    try:
        return Path(hf_hub_download(repository, file, endpoint=_endpoint()))
    except LocalEntryNotFoundError as error:
        reason = f"the hub can't be reached ({type(error).__name__})"
    except (RepositoryNotFoundError, EntryNotFoundError):
        reason = f"the hub has no {repository}/{file}, or asks for a login"
    except (*HUB_ERRORS, HFValidationError) as error:
        reason = f"the hub can't be reached ({type(error).__name__})"
    raise LearnerError(f'backbone = "{name}": {reason}; {HINT}')


def _stated(repository: str) -> dict[str, Any]:
    """Return licence, mean, std and image size as far as the repository states them."""
    stated: dict[str, Any] = {}
    try:
        card: Any = HfApi(_endpoint()).model_info(repository).card_data or {}
        stated["licence"] = card.get("license_name") or card.get("license")
        config = json.loads(Path(hf_hub_download(repository, CONFIG, endpoint=_endpoint())).read_text("utf-8"))
    except (*HUB_ERRORS, ValueError):
        return stated  # the weights are here; the report says "unknown"
    size = config.get("crop_size") or config.get("size") or {}
    side = (size.get("height") or size.get("shortest_edge")) if isinstance(size, dict) else size
    stated |= {"image_size": str(side) if side else None}
    for key, theirs in (("mean", "image_mean"), ("std", "image_std")):
        stated[key] = json.dumps(config[theirs]) if config.get(theirs) else None
    return stated
