"""The token bank: outputs of the frozen lower blocks for several views of every image, cached in `ROUND/tokens/`.

With `frozen_blocks` set, a step trains only the blocks above; it draws its views from this bank, and the lower blocks run
only once. On two cores a step then takes tenths of a second instead of seconds. A restarted round uses the bank if it was
made of the same images and recipe, and resumes one that was under way (`ROUND/tokens-under-way/`); else it rebuilds it.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cxrloop.durable import read_json, sync_folder, write_json
from learner.data import cache_key
from learner.data.feed import ImageFeed
from learner.data.packed_plates import remove_packed_plates
from learner.engine.step import Batch
from learner.errors import Paused
from learner.networks.backbone import Backbone
from learner.round.manifest import Sample
from learner.round.recipe import Recipe

KEYS = (  # of the recipe, that change the tokens
    "seed", "arch", "init", "pos_embed", "image_size", "local_size", "mean", "std",
    "frozen_blocks", "cached_views", "global_scale", "local_scale", "flip", "rotate", "global_noise", "local_noise",
    "precision",
)  # fmt: skip
UNDER_WAY, PROGRESS = "tokens-under-way", "progress.json"
SAVE_S = 30  # between two saves of a bank under way: at most as much work is lost when the process is killed
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
        under_way = UnderWay(round_folder / UNDER_WAY, key)
        _fill(under_way, samples, recipe, lower, feed, dtype, report)
        under_way.finish(folder)
    return TokenBank(folder, samples)


def remove_caches(round_folder: Path) -> None:
    """Remove packed plates and token bank, after the round is trained."""
    remove_packed_plates(round_folder)
    for name in ("tokens", UNDER_WAY):
        shutil.rmtree(round_folder / name, ignore_errors=True)


def local_versions(recipe: Recipe) -> int:
    """Return the local views of an image in the bank: twice those of a step, none for `evolve` without DINO loss."""
    return 0 if recipe.method == "evolve" and not recipe.lam else 2 * recipe.local_views


class UnderWay:
    """The files of a bank that is being filled, and how many samples of it are on disk."""

    def __init__(self, folder: Path, key: str) -> None:
        """Open the folder of an earlier process with this key, else start an empty one."""
        self.folder, self.key = folder, key
        saved = _read_progress(folder)
        self.done: int = saved["done"] if saved.get("key") == key else 0
        if not self.done:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        self.files = {path.stem: np.lib.format.open_memmap(path, "r+") for path in folder.glob("*.npy")}
        self.saved_at = time.monotonic()

    def write(self, name: str, rows: np.ndarray, tokens: np.ndarray, samples: int) -> None:
        """Write the tokens (B, views, n, D) of these rows of a file that has `samples` rows."""
        if name not in self.files:
            self.files[name] = new_memmap(self.folder / f"{name}.npy", (samples, *tokens.shape[1:]))
        self.files[name][rows] = tokens

    def save(self) -> None:
        """Make the tokens so far durable, then their number: a process that is killed later resumes here."""
        for file in self.files.values():
            file.flush()
        write_json(self.folder / PROGRESS, {"key": self.key, "done": self.done})
        self.saved_at = time.monotonic()

    def finish(self, target: Path) -> None:
        """Turn the folder into the finished bank."""
        self.save()
        (self.folder / PROGRESS).unlink()
        cache_key.write_key(self.folder, self.key)
        self.folder.replace(target)
        sync_folder(target.parent)


def _read_progress(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / PROGRESS)
    except ValueError:  # damaged: start again
        return {}


@torch.no_grad()
def _fill(
    bank: UnderWay, samples: Sequence[Sample], recipe: Recipe, lower: Backbone, feed: Callable[[Recipe, str], ImageFeed],
    dtype: torch.dtype | None, report: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Run all views of the samples that the bank lacks through the lower blocks, batch by batch, and write the tokens."""
    globals_, locals_ = recipe.cached_views, local_versions(recipe)
    lower.eval()
    wide = replace(recipe, local_views=locals_)
    numbered, source = feed(wide, "tokens"), max(1, globals_)
    for low in range(bank.done, len(samples), AT_ONCE):
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
            bank.write(name, rows, tokens.numpy(), len(samples))
        bank.done = int(rows[-1]) + 1
        if time.monotonic() - bank.saved_at >= SAVE_S:
            bank.save()
        try:
            report(bank.done, len(samples))
        except Paused:
            bank.save()
            raise
    if "part" not in bank.files:
        np.save(bank.folder / "part.npy", np.empty((len(samples), 0, 1, 1), np.float16))


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
