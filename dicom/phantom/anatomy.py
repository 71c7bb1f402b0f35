"""The anatomy of a phantom: a patient's body, its breathing on one day, and the density of a frontal chest.

Coordinates run from -1 to 1, x to the image's right (the patient's left), y down. Density is 0 in air and about 1
behind the heart. Everything is float32: one float64 array at 300 x 300 pixels makes the drawing a third slower.
Call it through `dicom.phantom.phantom`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

AIR = 0.74  # share of air in the path through the body, in the middle of a well filled lung

Array = np.ndarray
Seed = np.random.Generator


def soft(d: Array, edge: float) -> Array:
    """Return a smooth step 0..1 at d = 0, complete at a distance of 2 * `edge`."""
    t = d * (0.5 / edge)
    np.clip(t, -1, 1, out=t)
    return 0.5 + t * (0.75 - 0.25 * t * t)


# ------------------------------------------------------------------------------------------- the patient and breathing


@dataclass(frozen=True)
class Body:
    """The shape of one patient; lengths in half frames."""

    half: float  # width of half the thorax
    apex: float
    dome: tuple[float, float]  # y of the right (image left) and left dome
    arch: tuple[float, float]  # how round each dome is
    ctr: float  # cardiothoracic ratio before any finding
    tilt: float
    waist: float
    knob: float
    curve: float
    ribs: tuple[float, float, float]  # spacing, slope, density
    collar: tuple[float, float]
    fat: float
    breast: float
    air: float
    turn: float = 0.0


def build(rng: Seed, sex: str, age: float) -> Body:
    """Draw the shape of a patient; `age` in years."""
    old = (age - 55) / 40
    return Body(
        half=rng.uniform(0.68, 0.82),
        apex=rng.uniform(-0.86, -0.76),
        dome=(rng.normal(0.38, 0.04), rng.normal(0.43, 0.04)),
        arch=(rng.uniform(0.7, 1.3), rng.uniform(0.7, 1.3)),
        ctr=float(np.clip(rng.normal(0.435 + 0.01 * old, 0.022), 0.38, 0.49)),
        tilt=rng.uniform(0.25, 0.65),
        waist=rng.uniform(0.09, 0.125),
        knob=rng.uniform(0.05, 0.07) + 0.015 * old,
        curve=rng.normal(0, 0.02 + 0.01 * abs(old)),
        ribs=(rng.uniform(0.118, 0.14), rng.uniform(0.26, 0.46), rng.uniform(0.06, 0.12) - 0.01 * old),
        collar=(rng.uniform(-0.60, -0.50), rng.uniform(0.08, 0.2)),
        fat=rng.uniform(0.0, 1.0),
        breast=rng.uniform(0.3, 1.0) if sex == "F" else rng.uniform(0.0, 0.15),
        air=rng.uniform(0.9, 1.05) * AIR,
    )


def breathe(body: Body, rng: Seed, ap: bool) -> Body:
    """Return the same patient on another day: breath, rotation, aeration. AP means less breath and a larger heart."""
    down = rng.normal(-0.05 if ap else 0.0, 0.05)
    right, left = (dome + down + rng.normal(0, 0.02) for dome in body.dome)
    wide, narrow = (arch * rng.uniform(0.8, 1.2) for arch in body.arch)
    return replace(
        body,
        dome=(right, left),
        arch=(wide, narrow),
        ctr=body.ctr * (1.06 if ap else 1.0) * (1 - 0.5 * down) * rng.normal(1, 0.015),
        turn=rng.normal(0, 0.03),
        air=body.air * rng.uniform(0.85, 1.06),
        collar=(body.collar[0] - (0.08 if ap else 0.0) + rng.normal(0, 0.02), body.collar[1]),
    )


# --------------------------------------------------------------------------------------------------------- the chest


def chest(
    x: Array, y: Array, b: Body, shown: dict[str, float], lesion: dict[str, Seed], mottle: Array, rng: Seed, ap: bool
) -> Array:
    """Return the float32 density: 0 in air, about 1 behind the heart.

    Each finding draws its place from its own generator in `lesion`, so images with and without it differ only there.
    """
    spine = x - b.curve * np.sin(2.5 * y + 0.5)
    away = np.abs(x)
    left = x > 0  # the patient's left is the image's right
    base = 0.45
    q = np.clip((base - y) / (base - b.apex), 0, 1.2)
    q2 = q * q
    wall = b.half * np.sqrt(np.clip(1 - q2 * q, 0, 1)) * (1 - 0.06 * np.clip(y - base, 0, 1))
    inner = 0.09 + 0.26 * q2 * q2 * q2 * q2 * q2
    dome = np.where(left, np.float32(b.dome[1]), np.float32(b.dome[0]))
    arch = np.where(left, np.float32(b.arch[1]), np.float32(b.arch[0]))
    floor = dome + arch * (away - 0.30) ** 2
    aside = np.clip((away - inner) / np.maximum(wall - inner, 1e-3), 0, 1)
    fill = 0.62 + 0.38 * np.sqrt(np.clip(1 - (2 * aside - 1) ** 2, 0, 1))  # a lung is thinner at its edges
    cage = soft(wall - away, 0.012)
    lung = cage * soft(away - inner, 0.012) * soft(floor - y, 0.010)
    recess = cage * soft(floor + 0.16 - y, 0.08) * 0.10  # the lung behind and below the dome

    heart = _heart(x - b.turn, y, b, shown.get("cardiomegaly", 0.0), rng)
    middle = _mediastinum(spine - b.turn, y, b)
    air = (lung * fill + recess) * (1 - 0.90 * heart) * (1 - 0.85 * middle) * (1 + 0.05 * mottle)
    if "effusion" in shown:
        air = air * (1 - 0.95 * _effusion(x, away, y, floor, b, cage, shown["effusion"], lesion["effusion"]))
    if "opacity" in shown:
        air = air * (1 - _opacity(x, y, b, shown["opacity"], mottle, lesion["opacity"]))

    side = 0.25 + 0.75 * soft(y + 0.80, 0.05) - (0.86 - b.half - 0.10 * b.fat) * soft(y + 0.22, 0.12)
    thick = np.sqrt(np.clip(1 - (away / side) ** 2, 0, 1)) * (0.72 + 0.12 * b.fat) * (1 + 0.25 * soft(y - 0.5, 0.15))
    density = thick * (1 - b.air * air) + 0.10 * heart + 0.05 * middle
    density += _bones(x, spine, away, y, b, wall, cage, ap) * np.minimum(thick * 2, 1)
    density += lung * (1 - heart) * 0.10 * _vessels(x, y, b, rng)
    density += b.breast * 0.13 * _breasts(away, y, b)
    if "nodule" in shown:
        (cx, cy), r = _inside(b, lesion["nodule"]), lesion["nodule"].uniform(0.022, 0.045)
        density += (0.06 + 0.20 * shown["nodule"]) * soft(r - np.hypot(x - cx, y - cy), 0.012)
    gas = np.hypot((x - 0.33) / 0.13, (y - b.dome[1] - 0.13) / 0.06)
    density -= rng.uniform(0, 0.22) * soft(1 - gas, 0.3) * soft(y - floor - 0.02, 0.01)  # stomach bubble
    return density + (_wires(x, y, rng) if rng.random() < (0.6 if ap else 0.08) else 0)


def _heart(x: Array, y: Array, b: Body, strength: float, rng: Seed) -> Array:
    ctr = b.ctr + (0.025 + 0.155 * strength if strength else 0.0)
    half = ctr * b.half
    cx, cy = half * rng.uniform(0.30, 0.42), 0.5 * (b.dome[0] + b.dome[1]) - 0.17
    c, s = float(np.cos(b.tilt)), float(np.sin(b.tilt))
    u, v = (c * (x - cx) + s * (y - cy)) / half, (c * (y - cy) - s * (x - cx)) / (0.74 * half + 0.05)
    apex = np.hypot(x - cx - 0.50 * half, y - cy - 0.30 * half) / (0.52 * half)
    atrium = np.hypot((x - cx + 0.55 * half) / (0.48 * half), (y - cy + 0.01) / (0.20 + 0.2 * half))
    inside = np.exp(-9 * np.hypot(u, v)) + np.exp(-9 * apex) + np.exp(-9 * atrium)  # a union without notches
    return soft(1 + np.log(inside) / 9, 0.045)


def _mediastinum(x: Array, y: Array, b: Body) -> Array:
    waist = b.waist + 0.02 * np.clip(y + 0.5, -0.4, 0.6)
    band = soft(waist - np.abs(x - 0.01), 0.02) * soft(0.3 - y, 0.1)
    knob = soft(1 - np.hypot((x - b.waist) / b.knob, (y + 0.30) / (1.2 * b.knob)), 0.15)
    trunk = soft(1 - np.hypot((x - b.waist - 0.01) / 0.06, (y + 0.12) / 0.10), 0.2)
    hila = soft(1 - np.hypot((np.abs(x - 0.02) - 0.16) / 0.06, (y + 0.03) / 0.12), 0.4)
    pipe = soft(0.032 - np.abs(x + 0.01), 0.015) * soft(-0.24 - y, 0.04)  # trachea
    return np.maximum(np.maximum(band, knob), np.maximum(trunk, 0.45 * hila)) - 1.2 * pipe


def _bones(x: Array, spine: Array, away: Array, y: Array, b: Body, wall: Array, cage: Array, ap: bool) -> Array:
    space, slope, dense = b.ribs
    out = away / b.half
    cageish = soft(wall + 0.02 - away, 0.012) * soft(0.66 - y, 0.05)

    def row(drop: Array, first: float, width: float) -> Array:
        yy = y - drop - first
        p = yy / (space * (1 + 0.18 * np.clip(yy, 0, 1.4)))
        p = np.abs(p - np.floor(p) - 0.5)
        return soft(width - p, 0.035) * (0.6 + 9.0 * np.minimum(p, 0.22) ** 2) * soft(yy, 0.02)

    ribs = dense * row(slope * out * out - 0.06 * np.sin(2.2 * out), b.apex + 0.04, 0.19) * soft(away - 0.07, 0.02)
    ribs += 0.55 * dense * row(0.42 * (1 - out), b.apex + 0.06, 0.22) * soft(out - 0.42, 0.12)
    rise = b.collar[0] - b.collar[1] * (np.abs(x - b.turn) / 0.8) - 0.025 * np.sin(7.5 * away)
    collar = soft(0.026 - np.abs(y - rise), 0.010) * soft(0.86 - away, 0.02) * soft(np.abs(x - b.turn) - 0.06, 0.02)
    blade = away - (0.50 if ap else 0.60) - 0.25 * (y + 0.5) ** 2
    blade = soft(blade, 0.02) * soft(0.05 - y - 0.3 * (away - 0.6), 0.05) * soft(y + 0.62, 0.04)
    arm = soft(1 - np.hypot((away - 0.97) / 0.13, (y + 0.58) / 0.15), 0.12)
    across = np.abs(spine)
    bodies = 0.8 + 0.35 * np.cos(50.3 * y)  # a vertebra every eighth
    column = soft(0.068 - across, 0.012) * bodies + 0.5 * soft(0.012 - np.abs(across - 0.04), 0.01)
    return ribs * cageish + 1.6 * dense * collar + 0.05 * blade + 0.14 * arm + 0.11 * column


def _vessels(x: Array, y: Array, b: Body, rng: Seed) -> Array:
    """Return float32 like x: branching bright lines from both hila, drawn as points and blurred."""
    size, roots, steps, thick = x.shape[0], 36, 56, 5
    sign = np.where(np.arange(roots) % 2, 1.0, -1.0)
    start = rng.uniform(-1.9, 1.9, roots)
    bend = np.cumsum(rng.normal(0, 0.10, (roots, steps)), axis=1) + start[:, None]
    pace = 0.012 * rng.uniform(0.7, 1.2, roots)[:, None]
    px = sign[:, None] * (0.15 + np.cumsum(np.cos(bend) * pace, axis=1))
    py = rng.normal(0, 0.05, roots)[:, None] + np.cumsum(np.sin(bend) * pace, axis=1)
    taper = np.linspace(1, 0.15, steps)[None, :, None]
    blur = rng.normal(0, 1, (2, roots, steps, thick)) * 0.010 * taper
    # the inverse of _grid's affine map, recovered from two corners
    ax, ay = (x[0, -1] - x[0, 0]) / (size - 1), (x[-1, 0] - x[0, 0]) / (size - 1)
    bx, by = px[..., None] + blur[0] - x[0, 0], py[..., None] + blur[1] - y[0, 0]
    det = ax * ax + ay * ay
    col, line = ((ax * bx - ay * by) / det).ravel(), ((ay * bx + ax * by) / det).ravel()
    ok = (col >= 1) & (col < size - 2) & (line >= 1) & (line < size - 2)
    weight = np.broadcast_to(taper, (roots, steps, thick)).ravel()[ok]
    spot = line[ok].astype(int) * size + col[ok].astype(int)
    return np.minimum(_blur(np.bincount(spot, weight, size * size).reshape(size, size)), 1.6).astype(np.float32)


def _blur(a: Array) -> Array:
    for axis in (0, 1):
        a = 0.25 * np.roll(a, 1, axis) + 0.5 * a + 0.25 * np.roll(a, -1, axis)
    return a


def _breasts(away: Array, y: Array, b: Body) -> Array:
    r = np.hypot((away - 0.40) / 0.34, (y - 0.28) / 0.36)
    return soft(1 - r, 0.06) * np.clip(0.4 + y, 0, 1)


def _wires(x: Array, y: Array, rng: Seed) -> Array:
    total = np.zeros_like(x)
    for _ in range(int(rng.integers(1, 4))):
        k, h, w = rng.uniform(-0.7, 0.7), rng.uniform(-0.4, 0.4), rng.uniform(1, 3)
        total += 0.10 * soft(0.006 - np.abs(x - k - 0.25 * np.sin(w * y + 9 * h)), 0.005) * soft(h + 0.2 - y, 0.01)
        total += 0.16 * soft(0.028 - np.hypot(x - k - 0.25 * np.sin(w * (h + 0.2) + 9 * h), y - h - 0.2), 0.006)
    return total


# ------------------------------------------------------------------------------------------------------- the findings


def _inside(b: Body, rng: Seed) -> tuple[float, float]:
    """Draw a place in a lung, mostly beside the heart."""
    side = -1 if rng.random() < 0.55 else 1
    y = rng.uniform(-0.45, 0.28)
    return side * rng.uniform(0.26 + 0.12 * (side > 0) * (y > 0), 0.82 * b.half - 0.1 * (y < -0.3)), y


def _effusion(x: Array, away: Array, y: Array, floor: Array, b: Body, cage: Array, strength: float, rng: Seed) -> Array:
    """Return 0..1 fluid in one costophrenic angle (or in both), under a meniscus that rises at the wall."""
    side = rng.integers(2)
    both = rng.random() < 0.5
    fluid = np.zeros_like(x)
    for s in (0, 1):
        if s != side and not both:
            continue
        corner = b.dome[s] + b.arch[s] * (b.half - 0.30) ** 2
        depth = 0.07 + 0.50 * strength * (1.0 if s == side else rng.uniform(0.3, 0.9))
        level = corner - depth * (0.35 + 0.65 * np.clip(away / b.half, 0, 1.1) ** 2)
        fluid += soft(y - level, 0.016 + 0.02 * strength) * cage * (x > 0 if s else x <= 0)
    return fluid


def _opacity(x: Array, y: Array, b: Body, strength: float, mottle: Array, rng: Seed) -> Array:
    """Return 0..1 loss of air: a patchy cloud in one lung (two clouds in half of the cases)."""
    total = np.zeros_like(x)
    for _ in range(1 + (rng.random() < 0.5)):
        cx, cy = _inside(b, rng)
        rx, ry = rng.uniform(0.12, 0.24, 2)
        d = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2
        total += np.clip(np.exp(-np.minimum(d, 20) * 0.8) * (1 + 0.45 * mottle), 0, 1)
    return np.minimum(total, 1) * (0.14 + 0.66 * strength)
