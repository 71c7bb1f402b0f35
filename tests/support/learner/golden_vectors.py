"""Inputs and outputs of published code for tests, and the tolerance of comparisons in float64."""

from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parents[2] / "golden"


def golden(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) if file[key].dtype.kind in "fib" else file[key] for key in file.files}


def close(ours, theirs, rtol=1e-9, atol=1e-10):
    theirs = torch.as_tensor(theirs, dtype=torch.float64 if isinstance(theirs, float) else None)
    torch.testing.assert_close(torch.as_tensor(ours), theirs, rtol=rtol, atol=atol)
