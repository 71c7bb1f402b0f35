"""Backbone files as the agent and the learner see them: which names are files, and the hash of a file's tensors.

The hash decides whether two files hold the same backbone. Must not import torch: the agent plans rounds with this module.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any, BinaryIO

from learner.errors import LearnerError

SUFFIX = ".safetensors"
LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format
CHUNK = 1 << 20  # bytes read at once


def is_file_name(backbone: str) -> bool:
    """Whether a recipe's backbone names a file, not a model of the hub."""
    return backbone.endswith(SUFFIX)


def content_hash(path: Path) -> str:
    """Return the SHA-256, 64 hex digits, of the tensors of a safetensors file: names, types, shapes and values.

    Metadata, the order of tensors and the file's name do not count. Raises LearnerError for another file, and OSError.
    """
    with path.open("rb") as file:
        return _hash(file, str(path))


def content_hash_of(data: bytes) -> str:
    """Return `content_hash` of a safetensors file in memory."""
    return _hash(io.BytesIO(data), "tensors")


def _hash(file: BinaryIO, name: str) -> str:
    header, start = _header(file, name)
    digest = hashlib.sha256()
    for key, entry in sorted(header.items()):
        if key == "__metadata__":
            continue
        try:
            kind, shape, (low, high) = str(entry["dtype"]), [int(n) for n in entry["shape"]], entry["data_offsets"]
            digest.update(json.dumps([key, kind, shape]).encode())
            file.seek(start + low)
            left = high - low
        except (KeyError, TypeError, ValueError) as error:
            raise LearnerError(f"{name}: not a safetensors file (tensor {key}: {error})") from None
        while left > 0:
            part = file.read(min(CHUNK, left))
            if not part:
                raise LearnerError(f"{name}: ends within tensor {key}; copy the file again")
            digest.update(part)
            left -= len(part)
    return digest.hexdigest()


def _header(file: BinaryIO, name: str) -> tuple[dict[str, Any], int]:
    """Return the JSON header of a safetensors file and where the tensors start, in bytes."""
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(length)) if length <= LARGEST_HEADER else None
    except ValueError:  # not JSON, or not UTF-8
        header = None
    if not isinstance(header, dict):
        raise LearnerError(
            f"{name}: not a safetensors file; `cxrloop backbone fetch {name} --out FILE{SUFFIX}` makes one"
        )
    return header, 8 + length
