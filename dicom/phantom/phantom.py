"""Procedural chest images: lungs, heart, bones and four findings, drawn by numpy from a seed.

For demos, tests and heartbeats. Phantoms are EASY: the anatomy is a dozen curves and a finding is one more. An AUC
measured on them shows that the loop works, and nothing about patients; report the raw-pixel baseline beside it.
Returns stored values (12 bit, MONOCHROME2); `dicom.phantom.wrap` converts them to DICOM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from dicom.phantom.anatomy import Array, Seed, breathe, build, chest, soft

FINDINGS = ("cardiomegaly", "effusion", "opacity", "nodule")  # nodule is the hard one
SIZE = 288  # about 15 ms an image on one core; enough for a 2-pixel fissure, small enough for a test
TOP = 4095  # 12 bit


@dataclass(frozen=True)
class Phantom:
    """The parameters of one image; `pixels()` draws it."""

    patient: str
    seed: int
    anatomy: int  # seed of the patient's anatomy, the same for all images of a patient
    number: int  # 0 for the patient's first image
    view: str
    sex: str
    age_years: int
    labels: Mapping[str, int]
    strengths: Mapping[str, float] = field(default_factory=dict)

    def pixels(self, size: int = SIZE) -> Array:
        """Draw the image: uint16 [size, size], 12 bit, MONOCHROME2."""
        return image(self.seed, self.strengths, self.view, size, self.anatomy, self.sex, self.age_years)


def draw(
    n: int,
    seed: int,
    findings: Sequence[str] = FINDINGS[:3],
    prevalence: float | Mapping[str, float] = 0.3,
    strength: tuple[float, float] = (0.15, 1.0),
    repeat: float = 0.25,
    ap: float = 0.3,
    prefix: str = "PHANTOM",
) -> list[Phantom]:
    """Return `n` phantoms, the same for the same arguments; the first m are those of `draw(m)`.

    `strength`: range of a finding from barely visible to obvious. `repeat`: probability that an image belongs to the
    previous patient; each label then stays the same with a probability of 80 %. View, sex and age are independent of
    the labels, so they do not reveal a label.
    """
    unknown = [name for name in findings if name not in FINDINGS]
    if unknown:
        raise ValueError(f"finding {unknown[0]!r}: phantoms can show {', '.join(FINDINGS)}")
    share = prevalence if isinstance(prevalence, Mapping) else dict.fromkeys(findings, prevalence)
    made: list[Phantom] = []
    patient = number = -1
    sick: dict[str, int] = {}
    sex, age = "F", 60
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        again = i > 0 and number < 4 and rng.random() < repeat
        if not again:
            patient, number = patient + 1, -1
            sex, age = str(rng.choice(["F", "M"])), int(np.clip(rng.normal(58, 17), 18, 95))
        number += 1
        keep = {name: again and rng.random() < 0.8 for name in findings}
        sick = {name: sick[name] if keep[name] else int(rng.random() < share[name]) for name in findings}
        strengths = {name: float(rng.uniform(*strength)) for name in findings}
        made.append(
            Phantom(
                patient=f"{prefix}-{seed}-{patient:05d}",
                seed=int(rng.integers(2**31)),
                anatomy=int(np.random.default_rng([seed, 7919, patient]).integers(2**31)),
                number=number,
                view="AP" if rng.random() < ap else "PA",
                sex=sex,
                age_years=age,
                labels=dict(sick),
                strengths={name: s for name, s in strengths.items() if sick[name]},
            )
        )
    return made


def image(
    seed: int,
    findings: Mapping[str, float] | None = None,
    view: str = "PA",
    size: int = SIZE,
    anatomy: int | None = None,
    sex: str = "M",
    age_years: float = 60,
) -> Array:
    """Draw a frontal chest: uint16 [size, size], 12 bit, MONOCHROME2; `findings` maps names to strengths in (0, 1]."""
    shown = dict(findings or {})
    if not set(shown) <= set(FINDINGS) or view not in ("PA", "AP"):
        raise ValueError(f"image(findings={shown}, view={view!r}): allowed are {FINDINGS} and PA, AP")
    rng = np.random.default_rng(seed)
    body = build(np.random.default_rng(seed if anatomy is None else anatomy), sex, age_years)
    body = breathe(body, rng, view == "AP")
    x, y = _grid(size, rng, turn=3.0)
    mottle = _mottle(size, rng)
    lesion = {name: np.random.default_rng([seed, i]) for i, name in enumerate(FINDINGS)}
    density = chest(x, y, body, shown, lesion, mottle, rng, view == "AP")
    return _expose(density, rng, marker="L" if rng.random() < 0.5 else "R", noisy=1.5 if view == "AP" else 1.0)


def lateral(seed: int, size: int = SIZE) -> Array:
    """Draw a lateral chest, which a frontal model must never score: uint16 [size, size], 12 bit."""
    rng = np.random.default_rng(seed)
    x, y = _grid(size, rng, turn=3.0)
    trunk = np.sqrt(np.clip(1 - (np.abs(x - 0.02) / (0.74 + 0.12 * soft(y + 0.1, 0.4))) ** 2, 0, 1))
    thick = trunk * (0.95 + 0.2 * soft(y - 0.4, 0.2))
    lung = soft(0.92 - np.hypot((x - 0.02 - 0.06 * y) / 0.62, (y + 0.10) / 0.72), 0.03)
    lung = lung * soft(0.30 + 0.9 * (x + 0.1) ** 2 - y, 0.012)
    heart = soft(1 - np.hypot((x + 0.22 + 0.3 * (y - 0.1)) / 0.30, (y - 0.12) / 0.32), 0.06)
    arch = soft(1 - np.hypot((x - 0.02) / 0.16, (y + 0.32) / 0.16), 0.2) * 0.5
    spine = soft(0.085 - np.abs(x - 0.50 - 0.10 * np.cos(2 * y)), 0.015) * (0.8 + 0.35 * np.cos(46 * y) ** 3)
    ribs = soft(0.2 - np.abs((y - 0.5 * x) / 0.13 - np.floor((y - 0.5 * x) / 0.13) - 0.5), 0.05)
    density = thick * (1 - 0.68 * lung * (1 - 0.8 * heart) * (1 - 0.5 * arch)) + 0.16 * spine + 0.04 * ribs * lung
    density += 0.35 * soft(np.abs(x + 0.05) - 0.35, 0.2) * soft(-0.62 - y, 0.08) * trunk  # shoulders, arms up
    return _expose(density + 0.02 * _mottle(size, rng) * lung, rng, marker="L")


def hip(seed: int, size: int = SIZE) -> Array:
    """Draw a pelvis and two hips, clearly not a chest: uint16 [size, size], 12 bit."""
    rng = np.random.default_rng(seed)
    x, y = _grid(size, rng, turn=3.0)
    away = np.abs(x)
    thick = 0.55 * np.sqrt(np.clip(1 - (away / (0.95 - 0.1 * soft(-y, 0.4))) ** 2, 0, 1))
    thick = thick * (1 - 0.5 * soft(0.07 - away, 0.05) * soft(y - 0.45, 0.1))  # between the thighs
    wing = soft(1 - np.hypot((away - 0.46) / 0.30, (y + 0.42) / 0.40), 0.06)
    inlet = soft(1 - np.hypot(x / 0.30, (y + 0.02) / 0.27), 0.05)
    sacrum = soft(0.22 - 0.25 * (y + 0.3) - away, 0.02) * soft(0.05 - y, 0.05)
    head = soft(1 - np.hypot(away - 0.56, y - 0.10) / 0.125, 0.08)
    neck = (
        soft(0.075 - np.abs((y - 0.18) - 0.75 * (away - 0.62)), 0.02)
        * soft(away - 0.56, 0.02)
        * soft(0.80 - away, 0.02)
    )
    shaft = soft(0.075 - np.abs(away - 0.76 + 0.06 * y), 0.012) * soft(y - 0.26, 0.03)
    cortex = shaft * soft(np.abs(away - 0.76 + 0.06 * y) - 0.04, 0.01)
    pubis = soft(1 - np.hypot((away - 0.22) / 0.22, (y - 0.34) / 0.17), 0.08)
    hole = soft(1 - np.hypot((away - 0.24) / 0.12, (y - 0.36) / 0.09), 0.1)
    bone = 0.17 * np.maximum(wing * (1 - inlet), sacrum) + 0.24 * head + 0.20 * neck + 0.16 * shaft + 0.12 * cortex
    density = thick + bone + 0.2 * pubis * (1 - hole) + 0.012 * _mottle(size, rng)
    return _expose(np.where(thick > 0, density, 0).astype(np.float32), rng, marker="R")


# ---------------------------------------------------------------- geometry: x to the image's right, y down, -1..1


def _grid(size: int, rng: Seed, turn: float) -> tuple[Array, Array]:
    """Return x, y float32 [size, size] with a random shift, tilt and magnification."""
    line = np.linspace(-1, 1, size, dtype=np.float32)
    angle, scale = np.radians(rng.normal(0, turn / 2)), rng.uniform(0.92, 1.08)
    dx, dy = rng.normal(0, 0.03, 2)
    c, s = np.float32(np.cos(angle) / scale), np.float32(np.sin(angle) / scale)  # float32 stays float32
    x, y = line[None, :] - np.float32(dx), line[:, None] - np.float32(dy)
    return c * x + s * y, c * y - s * x


@lru_cache(maxsize=4)
def _falloff(size: int) -> Array:
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]) * size
    weight = 1.0 / np.maximum(f, 3.0) ** 1.5  # the power of anatomical noise falls about as f^-3
    weight[f < 2] = 0
    return (weight / np.sqrt((weight**2).sum()) * size).astype(np.float32)


def _mottle(size: int, rng: Seed) -> Array:
    """Return a smooth cloud: float32 [size, size], mean 0, standard deviation about 1."""
    white = rng.standard_normal((2, size, size // 2 + 1), dtype=np.float32)
    return np.fft.irfft2((white[0] + 1j * white[1]) * _falloff(size), s=(size, size)).astype(np.float32) * (size / 2)


# --------------------------------------------------------------------------------------------------------- exposure


def _expose(density: Array, rng: Seed, marker: str | None, noisy: float = 1.0) -> Array:
    """Return uint16 like `density`, with random tone curve, veil, quantum noise, shutters and side marker."""
    size = density.shape[0]
    veil = (
        rng.normal(0, 0.05) * np.linspace(-1, 1, size)[:, None]
        + rng.normal(0, 0.04) * np.linspace(-1, 1, size)[None, :]
    )
    grain = rng.standard_normal(density.shape, dtype=np.float32)
    dose = 0.011 * noisy * rng.uniform(0.6, 1.8)
    d = density + veil.astype(np.float32) * (density > 0.05) + grain * dose * (0.5 + np.clip(density, 0, 1.2))
    centre, gain = rng.normal(0.50, 0.05), rng.uniform(4.2, 6.2)
    tone = 1 / (1 + np.exp(-(d - centre) * np.float32(gain)))
    low, high = rng.uniform(0, 260), rng.uniform(3200, 4095)
    out = low + (high - low) * np.clip((tone - 0.06) / 0.88, 0, 1)
    if marker:
        r, c = int(rng.uniform(0.05, 0.2) * size), int((0.06 if marker == "R" else 0.87) * size)
        h = max(size // 26, 5)
        out[r : r + h, c : c + max(h // 4, 1)] = TOP
        foot = slice(r + h - max(h // 4, 1), r + h) if marker == "L" else slice(r, r + max(h // 4, 1))
        out[foot, c : c + int(0.7 * h)] = TOP
    if rng.random() < 0.5:  # shutters
        edge = rng.integers(1, max(size // 16, 2), 4)
        for cut in (np.s_[: edge[0]], np.s_[-edge[1] :], np.s_[:, : edge[2]], np.s_[:, -edge[3] :]):
            out[cut] = 0
    return np.clip(out, 0, TOP).astype(np.uint16)
