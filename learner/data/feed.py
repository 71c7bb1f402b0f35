"""Images to batches: reads plates, and hands out the views of any batch of any pass, always the same ones.

An image's random numbers come from (seed, feed, pass, index) alone; nothing depends on what was read before, so a batch
can be made again after a crash, and each rank makes its own share of it. Knows no labels' meaning and no network.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from cxrloop.plate import PLATE_SHAPE
from learner.data.augment import NUMBERS_PER_VIEW, make_views, normalise, resize_matrix, to_image
from learner.data.packed_plates import PackedPlates
from learner.data.plates import label_table, read_plates
from learner.engine import distributed
from learner.engine.step import Batch
from learner.round.manifest import Sample
from learner.round.recipe import Recipe

READER = ThreadPoolExecutor(1, thread_name_prefix="plates")  # reads one batch ahead


class ImageFeed:
    """A feed over images. `name` ("unlabelled", "labelled", "t0") separates the random numbers of feeds."""

    def __init__(
        self,
        samples: Sequence[Sample],
        recipe: Recipe,
        device: torch.device,
        name: str,
        fixed_order: bool,
        labels: Tensor | None = None,  # (images, findings), nan = unknown; None = the images' own
        packed: PackedPlates | None = None,  # holds these images packed; None = plates are read and resized at each use
    ) -> None:
        self.samples, self.recipe, self.device = samples, recipe, device
        self.stream = int.from_bytes(name.encode()[:6])
        self.fixed_order = fixed_order  # the published correction goes through the labelled images in one order
        self.size = min(recipe.batch, len(samples))
        # labelled passes keep every image, in even batches; unlabelled ones drop the last short batch, as published
        self.batches = -(-len(samples) // recipe.batch) if name != "unlabelled" else len(samples) // self.size
        self.drop = name == "unlabelled"
        self.matrix = resize_matrix(PLATE_SHAPE[0], recipe.image_size).to(device)
        self.labels = label_table(samples) if labels is None else labels
        self.packed = packed
        self._ahead: tuple[tuple[int, ...], Future[Tensor]] | None = None
        self._orders: dict[int, list[np.ndarray]] = {}  # of this pass and the next: a permutation of all images each

    def order(self, epoch: int) -> list[np.ndarray]:
        """Indices of the images of each batch of this pass, all ranks' together."""
        if epoch not in self._orders:
            kept = {other: order for other, order in self._orders.items() if abs(other - epoch) == 1}
            self._orders = kept | {epoch: self._make_order(epoch)}
        return self._orders[epoch]

    def _make_order(self, epoch: int) -> list[np.ndarray]:
        shuffled = self._generator(0 if self.fixed_order else epoch, 0).permutation(len(self.samples))
        if self.drop:
            return list(shuffled[: self.batches * self.size].reshape(self.batches, self.size))
        return np.array_split(shuffled, self.batches)

    def batch(self, epoch: int, index: int) -> Batch:
        """This rank's images of one step; their views are made on the device, part by part."""
        return self.of(epoch, self.mine(epoch, index), self._stored(epoch, index), self.order(epoch)[index])

    def mine(self, epoch: int, index: int) -> np.ndarray:
        """Indices of this rank's images of a batch; may be empty."""
        chosen = self.order(epoch)[index]
        return chosen[distributed.rank_slice(len(chosen))]

    def of(
        self, epoch: int, chosen: np.ndarray, stored: Tensor | None = None, whole: np.ndarray | None = None
    ) -> Batch:
        """These images (positions) with the views they have in this pass; `whole`: with those of the other ranks."""
        images = self._read(chosen) if stored is None else stored

        def views(part: slice) -> list[Tensor]:
            numbers = torch.from_numpy(np.stack([self._numbers(epoch, i) for i in chosen[part]]))
            return make_views(self._images(images[part].to(self.device, non_blocking=True)), numbers, self.recipe)

        return self.pack(chosen, views, chosen if whole is None else whole)

    def pack(self, chosen: np.ndarray, views: Callable[[slice], list[Tensor]], whole: np.ndarray) -> Batch:
        """A batch of these images and their labels, and what is counted over the whole batch, that of all ranks."""
        places = torch.from_numpy(chosen)
        known = (~self.labels[torch.from_numpy(whole)].isnan()).sum().to(self.device)
        return Batch(len(chosen), views, self.labels[places].to(self.device), places, len(whole), known)

    def _stored(self, epoch: int, index: int) -> Tensor:
        """This rank's images as they lie on the disk, in host memory; those that follow are sent for."""
        place, ahead = (epoch, index, distributed.world_size()), self._ahead
        stored = ahead[1].result() if ahead and ahead[0] == place else self._read(self.mine(epoch, index))
        following = (epoch, index + 1) if index + 1 < self.batches else (epoch + 1, 0)
        if not ahead or ahead[0][:2] != following:
            self._ahead = ((*following, distributed.world_size()), READER.submit(self._read, self.mine(*following)))
        return stored

    def _read(self, chosen: np.ndarray) -> Tensor:
        samples = [self.samples[i] for i in chosen]
        if not samples:
            return torch.empty(0)  # the other ranks have this batch to themselves
        stored = self.packed.read(samples) if self.packed else read_plates(samples)
        return stored.pin_memory() if self.device.type == "cuda" else stored  # copied while the device computes

    def _images(self, stored: Tensor) -> Tensor:
        return self.packed.images(stored) if self.packed else to_image(stored, self.matrix)

    def unaugmented(self, chosen: np.ndarray) -> Tensor:
        """These images as the network sees them without noise: (B, 1, S, S)."""
        return normalise(self._images(self._read(chosen).to(self.device)), self.recipe)

    def _numbers(self, epoch: int, index: int) -> np.ndarray:
        views = 1 + self.recipe.local_views
        return self.draws(epoch, index, views * NUMBERS_PER_VIEW).reshape(views, NUMBERS_PER_VIEW)

    def draws(self, epoch: int, index: int, count: int) -> np.ndarray:
        """The first uniform numbers of an image in a pass: float32 (count,)."""
        return self._generator(epoch, 1 + int(index)).random(count, dtype=np.float32)

    def _generator(self, epoch: int, place: int) -> np.random.Generator:
        return np.random.default_rng([self.recipe.seed, self.stream, epoch, place])
