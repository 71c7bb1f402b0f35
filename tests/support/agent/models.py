"""Small real ONNX models for the agent's tests: importing, passing the gate, and scoring without a server."""

from pathlib import Path

import numpy as np

from agent.ledger.database import Ledger
from agent.release import models
from agent.rounds import import_model, records
from agent.site import files
from agent.site.site import Site
from deploy.server.session import Session
from tests.support.deploy.model_server import FINDINGS, write_model

__all__ = ["FINDINGS", "InProcessServer", "add_model", "passed"]


def add_model(site: Site, ledger: Ledger, seed: int, evaluate: bool = False, **model: object) -> dict:
    """Write a small ONNX model and import it as `models import` does; return its answer."""
    path: Path = write_model(site.root / "run" / f"model{seed}.onnx", seed, **model)  # type: ignore[arg-type]
    return import_model.import_file(site, ledger, path, "test", evaluate)


def passed(ledger: Ledger, name: str) -> str:
    """Write a passing verdict for a round, as the gate does; return the bundle."""
    with ledger.transaction():
        scored = records.advance(ledger, records.get(ledger, name), "scored")
        return records.advance(ledger, scored, "passed", "a verdict written by the test").bundle or ""


class InProcessServer:
    """Scores plates with the bundle in service as the model server does, in this process and without HTTP."""

    def __init__(self, site: Site, ledger: Ledger) -> None:
        self.site, self.ledger = site, ledger

    def predict(self, plates: np.ndarray) -> tuple[str, tuple[str, ...], np.ndarray]:
        return self.explain(plates)[:3]

    def explain(self, plates: np.ndarray) -> tuple[str, tuple[str, ...], np.ndarray, np.ndarray]:
        current = models.in_service(self.ledger)
        assert current is not None
        bundle = files.open_sealed(self.site, current.id)
        answer = Session(bundle, "cpu", 1).predict(plates)
        return bundle.id, bundle.findings, answer.probabilities, answer.heatmap
