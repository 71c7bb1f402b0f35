"""Arrays from .npy files and bytes, one header at a time.

numpy parses a header with Python's `ast`, whose recursion counter all threads share. Up to CPython 3.12 two headers parsed
at once can raise SystemError (gh-106905); tests/learner/data/test_npy_threads.py reproduces it.
"""

import io
import threading
from pathlib import Path

import numpy as np

_HEADER = threading.Lock()


def load(path: Path) -> np.ndarray:
    """Return the array of an .npy file, in memory. Raises OSError (FileNotFoundError), ValueError, EOFError."""
    with _HEADER:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(mapped, np.ndarray):
        raise ValueError("an archive of arrays; expected one array")
    return np.array(mapped)


def loads(data: bytes) -> np.ndarray:
    """Return the array of an .npy file's bytes. Raises ValueError, EOFError."""
    with _HEADER:
        return np.load(io.BytesIO(data), allow_pickle=False)
