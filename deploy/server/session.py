"""One bundle loaded on one provider: scores plates, and checks the model against its sealed probe.

Must not import HTTP code or torch.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from cxrloop.plate import PLATE_SHAPE
from deploy import runtime
from deploy.bundle.bundle import Bundle
from deploy.bundle.contract import read_probe
from deploy.errors import BundleRefused, NoAnswer, ProbeMismatch, ProviderUnavailable, RunFailed

# The gate's parity bar is |dp| <= 1e-3; a sigmoid's slope is at most 1/4, so this bound on logits implies it.
PROBE_TOLERANCE = 4e-3


@dataclass(frozen=True)
class Answer:
    """probabilities float64 [N, F]; float32 logits [N, F], embedding [N, D], heatmap [N, F, g, g]."""

    probabilities: np.ndarray
    logits: np.ndarray
    embedding: np.ndarray
    heatmap: np.ndarray


class Session:
    """A verified bundle in memory, safe to call from several threads.

    `provider` "auto" takes CUDA if it works, else the CPU; "cuda" without a working GPU raises ProviderUnavailable.
    Raises BundleRefused for a model that breaks the contract.
    """

    def __init__(self, bundle: Bundle, provider: str = "auto", threads: int | None = None):
        runtime.require(provider)
        self.bundle = bundle
        model = (bundle.folder / "model.onnx").read_bytes()
        if (
            hashlib.sha256(model).hexdigest() != bundle.files["model.onnx"]
        ):  # the file may have changed since open_bundle
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
        """Return the scores of plates uint8 [N, 512, 512]; ValueError for other shapes, NoAnswer for NaN or infinity."""
        if plates.dtype != np.uint8 or plates.ndim != 3 or plates.shape[1:] != PLATE_SHAPE or not len(plates):
            raise ValueError(f"plates: got {plates.dtype} {list(plates.shape)}, expected uint8 [N, 512, 512], N >= 1")
        logits, embedding, heatmap = runtime.run(self._run, plates)
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if len(bad):
            raise NoAnswer(f"bundle {self.bundle.id}: the answer for image {bad[0]} of {len(plates)} is not finite")
        return Answer(probabilities(logits), logits, embedding, heatmap)

    def warm(self) -> None:
        """Run once, so that the first image doesn't wait for kernels and memory; raises like `probe`."""
        self._try(np.zeros((1, *PLATE_SHAPE), np.uint8))

    def probe(self) -> float:
        """Return the largest |logit difference| from the sealed probe; ProbeMismatch above PROBE_TOLERANCE.

        Raises ProviderUnavailable if the GPU failed: that is no evidence against the bundle.
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
        except RunFailed as wrong:
            if self.provider == "cuda":
                raise ProviderUnavailable(f"{wrong}; see nvidia-smi") from None
            raise self._mismatch(wrong) from None
        except NoAnswer as wrong:
            raise self._mismatch(wrong) from None

    def _mismatch(self, wrong: NoAnswer) -> ProbeMismatch:
        return ProbeMismatch(f"{wrong}, on its own test plates; train or export it again")


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return sigmoid(logits) in float64, which keeps ranks in the tails; the graph includes the temperatures."""
    return np.exp(-np.logaddexp(0, -logits.astype(np.float64)))
