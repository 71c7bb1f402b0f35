"""Small real images for the agent's tests, and the way into a site's inbox and ledger."""

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
    """Return uint8 [side, side]: a pattern of blocks, different for each seed, neither blank nor tiny."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(20, 235, (8, 8)).astype(np.uint8)
    return np.kron(coarse, np.ones((side // 8, side // 8), np.uint8))


def xray(seed: int, patient: str | None = None, **facts: object) -> Dataset:
    """Return a frontal image; by default each seed has a patient of its own."""
    return wrap(pixels(seed), patient_id=patient or f"P{seed:04d}", **{"view": "PA", **facts})  # type: ignore[arg-type]


def save(dataset: Dataset, path: Path) -> Path:
    """Write a data set as a DICOM file and return its path."""
    dataset.save_as(path, enforce_file_format=True)
    return path


def put(site: Site, dataset: Dataset, name: str = "image.dcm") -> Path:
    """Put a data set into the inbox, as the listener does; return the inbox file."""
    scratch = save(dataset, site.root / "run" / f"{os.getpid()}-{name}")
    inbox_file = site.inbox.put(scratch.read_bytes())
    scratch.unlink()
    return inbox_file


class InProcessExaminer:
    """Examines in this process: the bounded worker process takes a second to start and has tests of its own."""

    def __init__(self, site: Site) -> None:
        self.key, self.rules = site.key("pseudonym.key"), Admission()

    def examine(self, paths):
        return ((path, examine(path, self.key, self.rules)) for path in paths)


def take_in(site: Site, ledger: Ledger) -> int:
    """Run the intake until the inbox is empty; return the number of files."""
    count = 0
    while files := intake.step(site, ledger, InProcessExaminer(site)):  # type: ignore[arg-type]
        count += files
    return count
