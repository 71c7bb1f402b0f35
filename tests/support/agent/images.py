"""Small real images for the agent's tests: wrapped arrays with a patient, and ways to take them in."""

import os
from pathlib import Path

import numpy as np
from pydicom import Dataset

from agent.images import intake
from agent.ledger.database import Ledger
from agent.site.site import Site
from dicom.intake.examine import Admission, examine
from dicom.phantom.wrap import wrap


def pixels(seed: int, side: int = 96) -> np.ndarray:
    """uint8 [side, side]: smooth blobs, different for each seed, neither blank nor tiny."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(20, 235, (8, 8)).astype(np.uint8)
    return np.kron(coarse, np.ones((side // 8, side // 8), np.uint8))


def xray(seed: int, patient: str | None = None, **facts: object) -> Dataset:
    """A frontal image of a patient (one patient a seed by default)."""
    return wrap(pixels(seed), patient_id=patient or f"P{seed:04d}", **{"view": "PA", **facts})  # type: ignore[arg-type]


def save(dataset: Dataset, path: Path) -> Path:
    dataset.save_as(path, enforce_file_format=True)
    return path


def put(site: Site, dataset: Dataset, name: str = "image.dcm") -> Path:
    """Lay a data set into the inbox, as the listener does."""
    scratch = save(dataset, site.root / "run" / f"{os.getpid()}-{name}")
    taken = site.inbox.put(scratch.read_bytes())
    scratch.unlink()
    return taken


class InProcessExaminer:
    """Examines in this process; the bounded pool has its own tests, and costs a second to start."""

    def __init__(self, site: Site) -> None:
        self.key, self.rules = site.key("pseudonym.key"), Admission()

    def examine(self, paths):
        return ((path, examine(path, self.key, self.rules)) for path in paths)


def take_in(site: Site, ledger: Ledger) -> int:
    """One intake step over the whole inbox."""
    taken = 0
    while step := intake.step(site, ledger, InProcessExaminer(site)):  # type: ignore[arg-type]
        taken += step
    return taken
