"""A golden set with scores of known true AUC, for the tests of the gate and of its figures. Draws, never reads."""

from math import sqrt
from statistics import NormalDist

import numpy as np

from learner.evaluation.gate import Check, Golden, Rules, Scores, Verdict, judge

ALPHA = 0.05 / 52
FINE = {"1": 2e-6, "8": 3e-6, "images": 64}
EASY = Rules(superiority_required=False)


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def binormal(rng: np.random.Generator, labels: np.ndarray, level: float, shared: np.ndarray, r: float) -> np.ndarray:
    """Scores with true AUC `level`, correlated sqrt(r) with `shared` noise."""
    noise = sqrt(r) * shared + sqrt(1 - r) * rng.standard_normal(len(labels))
    return noise + labels * sqrt(2) * NormalDist().inv_cdf(level)


class Site:
    """A golden set of one or two findings and scores of known true AUC on it."""

    def __init__(
        self, samples: int = 900, share: float = 0.3, findings=("effusion",), seed: int = 0, per_patient: int = 1
    ):
        self.rng = np.random.default_rng(seed)
        self.labels = (self.rng.random((samples, len(findings))) < share).astype(float)
        self.shared = self.rng.standard_normal((samples, len(findings)))
        self.findings = tuple(findings)
        self.patients = [f"p{i // per_patient:05d}" for i in range(samples)]

    @property
    def golden(self) -> Golden:
        return Golden(self.labels, self.patients, self.findings)

    def model(self, *levels: float, r: float = 0.95, findings: tuple[str, ...] = ()) -> Scores:
        """Probabilities whose mean is about the prevalence: a slope on the log odds and a fitted intercept."""
        columns = []
        for j, level in enumerate(levels):
            known = np.nan_to_num(self.labels[:, j], nan=0.0)
            raw = binormal(self.rng, known, level, self.shared[:, j], r)
            share = min(max(np.nanmean(self.labels[:, j]) if known.any() else 0.1, 0.01), 0.99)
            low, high = -20.0, 20.0
            for _ in range(50):
                middle = (low + high) / 2
                low, high = (middle, high) if logistic(raw + middle).mean() < share else (low, middle)
            columns.append(logistic(raw + low))
        return Scores(np.array(columns).T, findings)

    def judge(self, candidate, champion, baseline=None, rules=EASY, alpha=ALPHA, parity=FINE, measured=()) -> Verdict:
        return judge(candidate, champion, baseline or champion, self.golden, rules, alpha, parity, measured)


def row(verdict: Verdict, name: str, finding: str | None = None) -> Check:
    (check,) = [c for c in verdict.checks if c.name == name and c.finding == finding]
    return check
