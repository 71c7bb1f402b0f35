"""Read .npy arrays from several threads safely.

numpy parses a header with Python's `ast`, whose depth counter all threads share. Up to CPython 3.12, two headers parsed
at once can raise SystemError (gh-106905); tests/learner/data/test_npy_threads.py shows it.
"""

import io
import threading
from pathlib import Path

import numpy as np

HEADER_LOCK = threading.Lock()  # hold it around every numpy call that parses a .npy header


def load(path: Path) -> np.ndarray:
    """Return the array of a file. Raises FileNotFoundError, ValueError."""
    with HEADER_LOCK:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    return np.array(mapped)


def loads(data: bytes) -> np.ndarray:
    """Return the array of a file's bytes. Raises ValueError."""
    with HEADER_LOCK:
        return np.load(io.BytesIO(data), allow_pickle=False)
