"""Frozen lower blocks run once: the tokens of several noised versions of every image, kept in `ROUND/tokens/`.

With `frozen_blocks` set, a step only trains what lies above; its views are drawn from this bank instead of being made
and sent through the lower blocks again. On two cores that is the difference between seconds and tenths of a second.
A cache: made of the same images and recipe it is used again, else made anew. Knows no label and no loss.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cxrloop.durable import whole_folder
from learner.data import cache_key
from learner.data.feed import ImageFeed
from learner.data.packed_plates import remove_packed_plates
from learner.engine.step import Batch
from learner.networks.backbone import Backbone
from learner.round.manifest import Sample
from learner.round.recipe import Recipe

KEYS = (  # of the recipe: what the tokens depend on
    "seed", "arch", "backbone", "init", "pos_embed", "image_size", "local_size", "mean", "std",
    "frozen_blocks", "cached_views", "global_scale", "local_scale", "flip", "rotate", "global_noise", "local_noise",
    "precision",
)  # fmt: skip
AT_ONCE = 32  # images in one pass through the lower blocks


class TokenBank:
    """Tokens by image: float16 `whole` (images, 1 + cached_views, n, D), the original first, and `part` (images, L, m, D)."""

    def __init__(self, folder: Path, samples: Sequence[Sample]) -> None:
        self.whole = np.load(folder / "whole.npy", mmap_mode="r")
        self.part = np.load(folder / "part.npy", mmap_mode="r")
        self.row = {sample.image: row for row, sample in enumerate(samples)}

    def unaugmented(self, samples: Sequence[Sample]) -> Tensor:
        """Tokens of the images as they are: float32 (B, n, D)."""
        return torch.from_numpy(self.whole[[self.row[sample.image] for sample in samples], 0]).float()

    def views(self, samples: Sequence[Sample], numbers: Tensor, local_views: int) -> list[Tensor]:
        """Original, one noised version and `local_views` different crops; `numbers` (B, 1 + locals) in [0, 1) choose."""
        rows = [self.row[sample.image] for sample in samples]
        noised = 1 + (numbers[:, 0] * (self.whole.shape[1] - 1)).long()
        chosen = [self.whole[rows, 0], self.whole[rows, noised.numpy()]]
        if local_views:
            first = (numbers[:, 1] * self.part.shape[1]).long()
            for i in range(local_views):  # the next ones in the circle: no crop twice in one step
                chosen.append(self.part[rows, ((first + i) % self.part.shape[1]).numpy()])
        return [torch.from_numpy(view).float() for view in chosen]


def open_token_bank(
    round_folder: Path, samples: Sequence[Sample], recipe: Recipe, lower: Backbone, feed: Callable[[Recipe, str], ImageFeed],
    dtype: torch.dtype | None, weights: str, said: Callable[[int, int], None] = lambda done, of: None,
) -> TokenBank:  # fmt: skip
    """The bank of these images, made now unless it is there; `weights` names what `lower` holds (part of the key)."""
    folder = round_folder / "tokens"
    made_of = {key: getattr(recipe, key) for key in KEYS} | {"crops": local_versions(recipe)}
    made_of |= {"weights": weights, "images": [f.image for f in samples]}
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    if not cache_key.matches(folder, key):
        shutil.rmtree(folder, ignore_errors=True)
        with whole_folder(folder) as temp:
            _fill(temp, samples, recipe, lower, feed, dtype, said)
            cache_key.write_key(temp, key)
    return TokenBank(folder, samples)


def remove_caches(round_folder: Path) -> None:
    """After a round that ended well: packed plates and tokens are of no more use."""
    remove_packed_plates(round_folder)
    shutil.rmtree(round_folder / "tokens", ignore_errors=True)


def local_versions(recipe: Recipe) -> int:
    """Crops an image has in the bank: twice what a step looks at; `evolve` without self-distillation looks at none."""
    return 0 if recipe.method == "evolve" and not recipe.lam else 2 * recipe.local_views


@torch.no_grad()
def _fill(
    folder: Path, samples: Sequence[Sample], recipe: Recipe, lower: Backbone, feed: Callable[[Recipe, str], ImageFeed],
    dtype: torch.dtype | None, said: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Every version of every image through the lower blocks, version by version, straight into the files."""
    globals_, locals_ = recipe.cached_views, local_versions(recipe)
    lower.eval()
    files: dict[str, np.memmap] = {}
    wide = replace(recipe, local_views=locals_)
    numbered, source = feed(wide, "tokens"), max(1, globals_)
    for low in range(0, len(samples), AT_ONCE):
        rows = np.arange(low, min(low + AT_ONCE, len(samples)))
        views: dict[str, list[Tensor]] = {"whole": [], "part": []}
        for version in range(source):
            given = numbered.of(version, rows)
            made = given.views(slice(0, given.size))
            if version == 0:
                views["whole"].append(made[0])
                views["part"] += made[2:]
            if globals_:
                views["whole"].append(made[1])
        for name, images in views.items():
            if not images:
                continue
            with torch.autocast(images[0].device.type, dtype=dtype, enabled=dtype is not None):
                tokens = lower.lower(torch.cat(images)).half().cpu()
            tokens = tokens.unflatten(0, (len(images), len(rows))).transpose(0, 1)
            if name not in files:
                shape = (len(samples), *tokens.shape[1:])
                files[name] = memmap(folder / f"{name}.npy", shape)
            files[name][rows] = tokens.numpy()
        said(int(rows[-1]) + 1, len(samples))
    if "part" not in files:
        np.save(folder / "part.npy", np.empty((len(samples), 0, 1, 1), np.float16))


def memmap(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A new float16 array on the disk, whose room is taken now: a full disk is an OSError here, later it would be SIGBUS."""
    made = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return made


class TokenFeed:
    """A feed like `Images`, in the same order and with the same images a batch, whose views come from the bank."""

    def __init__(self, samples: ImageFeed, bank: TokenBank) -> None:
        self.inner, self.bank = samples, bank
        self.samples, self.labels, self.size, self.batches = (
            samples.samples,
            samples.labels,
            samples.size,
            samples.batches,
        )

    def unaugmented(self, chosen: np.ndarray) -> Tensor:
        """Tokens of these images (positions) without noise: (B, n, D)."""
        return self.bank.unaugmented([self.samples[i] for i in chosen]).to(self.inner.device)

    def batch(self, epoch: int, index: int) -> Batch:
        """This rank's images of one step; their views are tokens (B, n, D)."""
        chosen = self.inner.mine(epoch, index)
        samples = [self.samples[i] for i in chosen]

        def views(part: slice) -> list[Tensor]:
            draws = torch.from_numpy(np.stack([self.inner.draws(epoch, i, 2) for i in chosen[part]]))
            made = self.bank.views(samples[part], draws, self.inner.recipe.local_views)
            return [view.to(self.inner.device) for view in made]

        return self.inner.pack(chosen, views, self.inner.order(epoch)[index])
