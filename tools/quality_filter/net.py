"""The quality filter's net in torch, and its training images: turned, inverted, blurred, and images of other parts.

Training only. The net in service is dicom.pixels.quality_filter, in numpy, with the weights that `export` returns.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dicom.phantom import phantom

CHANNELS = (8, 24, 48, 64)
BATCH = 256
CHEST_SHARE = 0.5
DRAWN = 600  # drawings of each kind: limbs, pelves, clouds


class Net(nn.Module):
    """(B, 1, 32, 32) normalised plates -> (B, 6) logits: chest, inverted, turned by 0, 90, 180, 270 degrees."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (1, *CHANNELS)
        self.convs = nn.ModuleList(
            nn.Conv2d(sizes[i], sizes[i + 1], 3, stride=1 if i == 0 else 2, padding=1, bias=False) for i in range(4)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in CHANNELS)
        self.last = nn.Linear(CHANNELS[-1] * 16, 6)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.last(F.dropout(x.flatten(1), 0.2, self.training))


def export(net: Net, limits: Sequence[float]) -> dict[str, np.ndarray]:
    """Return the arrays of quality.npz: float16 weights that include the batch norms, and the three limits."""
    arrays = {}
    for i, (conv, norm) in enumerate(zip(net.convs, net.norms, strict=True)):
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        arrays[f"w{i}"] = conv.weight * scale[:, None, None, None]
        arrays[f"b{i}"] = norm.bias - norm.running_mean * scale
    arrays["w4"], arrays["b4"] = net.last.weight, net.last.bias
    halves = {name: value.detach().numpy().astype(np.float16) for name, value in arrays.items()}
    return halves | {"limits": np.array(limits, np.float64)}


def normal(small: Tensor) -> Tensor:
    """Return (B, 1, 32, 32) normalised as dicom.pixels.quality_filter.normal does."""
    return (small - small.mean((1, 2, 3), keepdim=True)) / (small.std((1, 2, 3), keepdim=True, correction=0) + 8)


@dataclass
class TrainingImages:
    """Training images by origin; each uint8 (n, 64, 64)."""

    chests: dict[str, Tensor]
    others: dict[str, Tensor]


def drawn(seed: int) -> dict[str, Tensor]:
    """Return drawings of limbs, pelves and clouds, uint8 (DRAWN, 64, 64) each: there are no images of other parts.

    The training chests include no phantoms: they are a test of the net.
    """
    rng = np.random.default_rng(seed)
    drawings = {
        "limbs": [_limbs(rng) for _ in range(DRAWN)],
        "pelves": [phantom.hip(seed + i, 64) // 16 for i in range(DRAWN)],
        "clouds": [_cloud(rng) for _ in range(DRAWN)],
    }
    return {name: torch.from_numpy(np.stack(images).astype(np.uint8)) for name, images in drawings.items()}


def _limbs(rng: np.random.Generator) -> np.ndarray:
    """Return one to six bones in soft tissue, in random positions, uint8 [64, 64]."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    image = np.zeros((64, 64))
    angle = rng.uniform(0, np.pi)
    for _ in range(rng.integers(1, 7)):
        turn = angle + rng.normal(0, 0.25)
        cx, cy, flesh = *rng.uniform(-0.6, 0.6, 2), rng.uniform(0.08, 0.55)
        along, across = (
            (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn),
            (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn),
        )
        reach = rng.uniform(0.3, 2.0)
        inside = np.clip((reach - np.abs(along)) * 8, 0, 1)
        bone, ends = flesh * rng.uniform(0.25, 0.6), 1 + rng.uniform(0, 0.8) * (np.abs(along) / reach) ** 4
        image += inside * 0.45 * np.sqrt(np.clip(1 - (across / flesh) ** 2, 0, 1)) * rng.uniform(0.3, 1)
        shaft = np.sqrt(np.clip(1 - (across / bone / ends) ** 2, 0, 1))
        image += inside * (0.5 * shaft - 0.3 * np.sqrt(np.clip(1 - (across / bone / ends * 1.5) ** 2, 0, 1)))
    return np.clip(image / max(image.max(), 1e-6) * 255 + rng.uniform(0, 30), 0, 255).astype(np.uint8)


def _cloud(rng: np.random.Generator) -> np.ndarray:
    """Return smooth noise with a few shapes, uint8 [64, 64], like a detector or phantom test."""
    f = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.rfftfreq(64)[None, :]) * 64
    spectrum = np.fft.rfft2(rng.normal(size=(64, 64))) / np.maximum(f, 1) ** rng.uniform(0.3, 2.5)
    image = np.fft.irfft2(spectrum)
    image = (image - image.min()) / np.ptp(image)
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    for _ in range(rng.integers(0, 5)):
        cx, cy, a, b = *rng.uniform(-0.8, 0.8, 2), *rng.uniform(0.05, 0.8, 2)
        round_ = rng.random() < 0.5
        shape = ((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 < 1 if round_ else (abs(x - cx) < a) & (abs(y - cy) < b)
        image = image * rng.uniform(0.1, 1) + shape * rng.uniform(-1, 1)
    return (np.clip((image - image.min()) / max(np.ptp(image), 1e-6), 0, 1) * 255).astype(np.uint8)


def batch(training: TrainingImages, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (inputs (B, 1, 32, 32), chest (B,), inverted (B,), quarter turns (B,)): half chests, origins balanced."""
    chests = int(BATCH * CHEST_SHARE)
    images = torch.cat([_pick(training.chests, chests, rng), _pick(training.others, BATCH - chests, rng)])
    x = images.float()[:, None] / 255
    some = torch.arange(chests, BATCH)
    for index in some[
        torch.rand(len(some), generator=rng) < 0.3
    ].tolist():  # a chest in pieces, or a part of one: not a chest
        x[index] = _broken(_pick(training.chests, 1, rng).float()[:, None] / 255, rng)
    is_chest = (torch.arange(BATCH) < chests).float()
    turned = torch.where(
        _chance(0.55, rng), torch.zeros(BATCH, dtype=torch.long), torch.randint(4, (BATCH,), generator=rng)
    )
    inverted = _chance(0.3, rng)
    return normal(F.avg_pool2d(_augment(x, inverted, turned, rng), 2)), is_chest, inverted.float(), turned


def _chance(share: float, rng: torch.Generator) -> Tensor:
    return torch.rand(BATCH, generator=rng) < share


def _pick(training: dict[str, Tensor], count: int, rng: torch.Generator) -> Tensor:
    names = list(training)
    which = torch.randint(len(names), (count,), generator=rng)
    return torch.stack(
        [training[names[w]][torch.randint(len(training[names[w]]), (1,), generator=rng)[0]] for w in which]
    )


def _broken(image: Tensor, rng: torch.Generator) -> Tensor:
    """Return (1, 64, 64) of (1, 1, 64, 64): tiles in random order, or a seventh to a third of the side enlarged."""
    if torch.rand(1, generator=rng) < 0.6:
        tiles = (2, 4, 8)[int(torch.randint(1, 3, (1,), generator=rng))]
        side = 64 // tiles
        cut = image.reshape(tiles, side, tiles, side).transpose(1, 2).reshape(-1, side, side)
        cut = cut[torch.randperm(len(cut), generator=rng)]
        return cut.reshape(tiles, tiles, side, side).transpose(1, 2).reshape(1, 64, 64)
    side = int(torch.randint(9, 21, (1,), generator=rng))
    top, left = (int(torch.randint(64 - side, (1,), generator=rng)) for _ in range(2))
    return F.interpolate(image[..., top : top + side, left : left + side], (64, 64), mode="bilinear")[0]


def _augment(x: Tensor, inverted: Tensor, turned: Tensor, rng: torch.Generator) -> Tensor:
    """Return 0..255 of x (B, 1, 64, 64) with random tone, blur, noise, marker, mirror, turn, framing and polarity."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(len(x), 1, 1, 1, generator=rng) * (high - low) + low

    low, high = uniform(-0.1, 0.2), uniform(0.8, 1.2)
    x = ((x - low) / (high - low)).clip(0, 1) ** torch.exp(uniform(-0.6, 0.6))
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x + (soft - x) * uniform(-0.4, 1) * (uniform(0, 1) < 0.6)  # blurred, or sharpened like a console's output
    x = (x + torch.randn(x.shape, generator=rng) * uniform(0, 0.05) * (uniform(0, 1) < 0.5)).clip(0, 1)
    for index in torch.nonzero(_chance(0.3, rng)).flatten().tolist():  # a side marker
        top, left = (int(torch.randint(60, (1,), generator=rng)) for _ in range(2))
        x[index, :, top : top + 4, left : left + 3] = 1
    before = inverted & _chance(0.5, rng)  # shutters drawn after the inversion stay black
    x[before] = 1 - x[before]
    x = torch.where(_chance(0.3, rng)[:, None, None, None], x.flip(3), x)  # the heart may be on the right
    x = torch.stack([torch.rot90(image, int(k), (1, 2)) for image, k in zip(x, turned, strict=True)])
    angle, scale, aspect = uniform(-0.2, 0.2), torch.exp(uniform(-0.25, 0.25)), torch.exp(uniform(-0.2, 0.2))
    cos, sin, zero = torch.cos(angle) * scale, torch.sin(angle) * scale, torch.zeros_like(angle)
    rows = [cos * aspect, -sin * aspect, zero + uniform(-0.15, 0.15), sin / aspect, cos / aspect, uniform(-0.15, 0.15)]
    grid = F.affine_grid(torch.cat(rows, 3).reshape(-1, 2, 3), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False)
    after = inverted & ~before
    x[after] = 1 - x[after]
    return x * 255


def loss(logits: Tensor, chest: Tensor, inverted: Tensor, turned: Tensor) -> Tensor:
    """Return the loss: chest for all images; polarity and turn for chests only."""
    is_chest = chest > 0
    return (
        F.binary_cross_entropy_with_logits(logits[:, 0], chest)
        + F.binary_cross_entropy_with_logits(logits[is_chest, 1], inverted[is_chest])
        + F.cross_entropy(logits[is_chest, 2:], turned[is_chest])
    )


def train(training: TrainingImages, steps: int, seed: int) -> Net:
    """Train a net for `steps` batches, one-cycle learning rate; reproducible for one seed and thread count."""
    torch.manual_seed(seed)
    rng, net = torch.Generator().manual_seed(seed), Net()
    optimiser = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=1e-2)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, steps)
    net.train()
    for _ in range(steps):
        inputs, *truth = batch(training, rng)
        optimiser.zero_grad()
        loss(net(inputs), *truth).backward()
        optimiser.step()
        cycle.step()
    return net
