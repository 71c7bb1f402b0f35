"""One bundle loaded on one provider: plates in, probabilities out, and the proof that it answers as it was sealed.

Refuses to know HTTP, the pointer and torch.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from deploy.bundle.bundle import Bundle, BundleRefused
from deploy.bundle.contract import PLATE_SIDE, read_probe
from deploy.server import runtime
from deploy.server.runtime import NoAnswer, NoRuntime, ProviderRefused, RunFailed

__all__ = ["Answer", "NoAnswer", "NoRuntime", "ProbeMismatch", "ProviderRefused", "Session"]

# The gate's parity bar is |dp| <= 1e-3; a sigmoid's slope is at most 1/4, so this bound on logits implies it.
PROBE_TOLERANCE = 4e-3


class ProbeMismatch(BundleRefused):
    """The loaded model does not answer its own probe as it did when it was sealed."""


@dataclass(frozen=True)
class Answer:
    """probabilities float64 [N, F]; float32 logits [N, F], embedding [N, D], heatmap [N, F, g, g]."""

    probabilities: np.ndarray
    logits: np.ndarray
    embedding: np.ndarray
    heatmap: np.ndarray


class Session:
    """A verified bundle in memory, safe to call from several threads.

    `provider` "auto" takes CUDA if it really runs and the CPU else; "cuda" that gets the CPU raises ProviderRefused.
    """

    def __init__(self, bundle: Bundle, provider: str = "auto", threads: int | None = None):
        runtime.require(provider)
        self.bundle = bundle
        model = (bundle.folder / "model.onnx").read_bytes()
        if hashlib.sha256(model).hexdigest() != bundle.files["model.onnx"]:  # what was checked is what is loaded
            raise BundleRefused(f"bundle {bundle.id}: model.onnx was changed after sealing; restore {bundle.folder}")
        try:
            self._run = runtime.load(model, provider, threads)
        except ValueError as wrong:
            raise BundleRefused(f"bundle {bundle.id}: model.onnx can't be loaded ({wrong}); export it again") from None
        self.provider = runtime.running(self._run)
        try:
            runtime.check_graph(self._run, len(bundle.findings))
        except ValueError as wrong:
            raise BundleRefused(f"bundle {bundle.id}: model.onnx {wrong}") from None

    def predict(self, plates: np.ndarray) -> Answer:
        """Scores of plates uint8 [N, 512, 512]; ValueError for other shapes, NoAnswer for a NaN."""
        if (
            plates.dtype != np.uint8
            or plates.ndim != 3
            or plates.shape[1:] != (PLATE_SIDE, PLATE_SIDE)
            or not len(plates)
        ):
            raise ValueError(f"plates: got {plates.dtype} {list(plates.shape)}, expected uint8 [N, 512, 512], N >= 1")
        logits, embedding, heatmap = runtime.run(self._run, plates)
        lost = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if len(lost):
            raise NoAnswer(f"bundle {self.bundle.id}: the answer for image {lost[0]} of {len(plates)} is not finite")
        return Answer(probabilities(logits), logits, embedding, heatmap)

    def warm(self) -> None:
        """Run once, so that the first image doesn't wait for kernels and arenas; fails as `probe` does."""
        self._try(np.zeros((1, PLATE_SIDE, PLATE_SIDE), np.uint8))

    def probe(self) -> float:
        """Largest |logit difference| from the sealed probe; ProbeMismatch above PROBE_TOLERANCE.

        ProviderRefused where the GPU itself failed: that says nothing against the bundle.
        """
        plates, sealed = read_probe(self.bundle.folder / "probe.npz", len(self.bundle.findings))
        difference = float(np.abs(self._try(plates).logits - sealed).max())
        if difference > PROBE_TOLERANCE:
            raise ProbeMismatch(
                f"bundle {self.bundle.id}: on {self.provider} its probe differs by {difference:.3g} in logits, allowed "
                f"{PROBE_TOLERANCE:g}; export it again, or serve with the provider it was made on"
            )
        return difference

    def _try(self, plates: np.ndarray) -> Answer:
        try:
            return self.predict(plates)
        except NoAnswer as wrong:
            if isinstance(wrong, RunFailed) and self.provider == "cuda":
                raise ProviderRefused(f"{wrong}; see nvidia-smi") from None
            raise ProbeMismatch(f"{wrong}, on its own test plates; train or export it again") from None


def probabilities(logits: np.ndarray) -> np.ndarray:
    """sigmoid(logits) in float64, so that ranks survive in the tails; temperatures are folded into the graph."""
    return np.exp(-np.logaddexp(0, -logits.astype(np.float64)))
