"""Arrays from .npy, one header at a time.

numpy reads a header with Python's `ast`, which counts its depth for all threads together: up to CPython 3.12 two headers
at once can end in a SystemError (gh-106905). tests/learner/data/test_npy_threads.py shows it.
"""

import io
import threading
from pathlib import Path

import numpy as np

_HEADER = threading.Lock()


def load(path: Path) -> np.ndarray:
    """The array of a file. Raises FileNotFoundError, ValueError."""
    with _HEADER:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    return np.array(mapped)


def loads(data: bytes) -> np.ndarray:
    """The array of a file's bytes. Raises ValueError."""
    with _HEADER:
        return np.load(io.BytesIO(data), allow_pickle=False)
