"""The token bank: outputs of the frozen lower blocks for several views of every image, cached in `ROUND/tokens/`.

With `frozen_blocks` set, a step trains only the blocks above; it draws its views from this bank, and the lower blocks run
only once. On two cores a step then takes tenths of a second instead of seconds. A restarted round uses the bank if it was
made of the same images and recipe, and rebuilds it if not.
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

KEYS = (  # of the recipe, that change the tokens
    "seed", "arch", "init", "pos_embed", "image_size", "local_size", "mean", "std",
    "frozen_blocks", "cached_views", "global_scale", "local_scale", "flip", "rotate", "global_noise", "local_noise",
    "precision",
)  # fmt: skip
AT_ONCE = 32  # images in one forward pass of the lower blocks


class TokenBank:
    """Tokens of N samples, float16: `whole` (N, 1 + cached_views, n, D), the unaugmented view first; `part` (N, L, m, D).

    `whole` has the global views, `part` the L local views.
    """

    def __init__(self, folder: Path, samples: Sequence[Sample]) -> None:
        self.whole = np.load(folder / "whole.npy", mmap_mode="r")
        self.part = np.load(folder / "part.npy", mmap_mode="r")
        self.row = {sample.image: row for row, sample in enumerate(samples)}

    def unaugmented(self, samples: Sequence[Sample]) -> Tensor:
        """Return the tokens of the unaugmented views of these samples, float32 (B, n, D)."""
        return torch.from_numpy(self.whole[[self.row[sample.image] for sample in samples], 0]).float()

    def views(self, samples: Sequence[Sample], numbers: Tensor, local_views: int) -> list[Tensor]:
        """Return the unaugmented view, one augmented global view and `local_views` different local views, (B, n, D) each.

        numbers (B, 2) in [0, 1): the first chooses the global view, the second the first local view.
        """
        rows = [self.row[sample.image] for sample in samples]
        augmented = 1 + (numbers[:, 0] * (self.whole.shape[1] - 1)).long()
        chosen = [self.whole[rows, 0], self.whole[rows, augmented.numpy()]]
        if local_views:
            first = (numbers[:, 1] * self.part.shape[1]).long()
            for i in range(local_views):  # consecutive, modulo L: no local view twice in a step
                chosen.append(self.part[rows, ((first + i) % self.part.shape[1]).numpy()])
        return [torch.from_numpy(view).float() for view in chosen]


def open_token_bank(
    round_folder: Path, samples: Sequence[Sample], recipe: Recipe, lower: Backbone, feed: Callable[[Recipe, str], ImageFeed],
    dtype: torch.dtype | None, weights: str, report: Callable[[int, int], None] = lambda done, of: None,
) -> TokenBank:  # fmt: skip
    """Return the token bank of these samples, built now unless it exists.

    `lower` is the backbone whose lower blocks run, `weights` names its weights in the cache's key, `feed(recipe, name)`
    returns a feed of the samples, and `report(done, of)` is called after each batch.
    """
    folder = round_folder / "tokens"
    made_of = {key: getattr(recipe, key) for key in KEYS} | {"crops": local_versions(recipe)}
    made_of |= {
        "backbone": recipe.backbone_sha256 or recipe.backbone,
        "weights": weights,
        "images": [f.image for f in samples],
    }
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    if not cache_key.matches(folder, key):
        shutil.rmtree(folder, ignore_errors=True)
        with whole_folder(folder) as temp:
            _fill(temp, samples, recipe, lower, feed, dtype, report)
            cache_key.write_key(temp, key)
    return TokenBank(folder, samples)


def remove_caches(round_folder: Path) -> None:
    """Remove packed plates and token bank, after the round is trained."""
    remove_packed_plates(round_folder)
    shutil.rmtree(round_folder / "tokens", ignore_errors=True)


def local_versions(recipe: Recipe) -> int:
    """Return the local views of an image in the bank: twice those of a step, none for `evolve` without DINO loss."""
    return 0 if recipe.method == "evolve" and not recipe.lam else 2 * recipe.local_views


@torch.no_grad()
def _fill(
    folder: Path, samples: Sequence[Sample], recipe: Recipe, lower: Backbone, feed: Callable[[Recipe, str], ImageFeed],
    dtype: torch.dtype | None, report: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Run all views of all samples through the lower blocks, batch by batch, and write the tokens into the files."""
    globals_, locals_ = recipe.cached_views, local_versions(recipe)
    lower.eval()
    files: dict[str, np.memmap] = {}
    wide = replace(recipe, local_views=locals_)
    numbered, source = feed(wide, "tokens"), max(1, globals_)
    for low in range(0, len(samples), AT_ONCE):
        rows = np.arange(low, min(low + AT_ONCE, len(samples)))
        views: dict[str, list[Tensor]] = {"whole": [], "part": []}
        for version in range(source):
            batch = numbered.views_of(version, rows)
            made = batch.views(slice(0, batch.size))
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
                files[name] = new_memmap(folder / f"{name}.npy", shape)
            files[name][rows] = tokens.numpy()
        report(int(rows[-1]) + 1, len(samples))
    if "part" not in files:
        np.save(folder / "part.npy", np.empty((len(samples), 0, 1, 1), np.float16))


def new_memmap(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Return a new float16 array on disk, with its space allocated now: a full disk is an OSError here, SIGBUS later."""
    array = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


class TokenFeed:
    """A feed with the batches of an `ImageFeed`, whose views are tokens from the bank."""

    def __init__(self, feed: ImageFeed, bank: TokenBank) -> None:
        self.feed, self.bank = feed, bank
        self.samples, self.labels, self.size, self.batches = feed.samples, feed.labels, feed.size, feed.batches

    def unaugmented(self, chosen: np.ndarray) -> Tensor:
        """Return the tokens (B, n, D) of the unaugmented views of the samples at these positions."""
        return self.bank.unaugmented([self.samples[i] for i in chosen]).to(self.feed.device)

    def batch(self, epoch: int, index: int) -> Batch:
        """Return this rank's samples of one step; their views are tokens (B, n, D)."""
        chosen = self.feed.rank_positions(epoch, index)
        samples = [self.samples[i] for i in chosen]

        def views(part: slice) -> list[Tensor]:
            draws = torch.from_numpy(np.stack([self.feed.uniform_numbers(epoch, i, 2) for i in chosen[part]]))
            made = self.bank.views(samples[part], draws, self.feed.recipe.local_views)
            return [view.to(self.feed.device) for view in made]

        return self.feed.as_batch(chosen, views, self.feed.order(epoch)[index])
