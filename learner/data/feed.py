"""Feeds: batches of images with their views, the same views every time a batch is made.

The random numbers of a sample depend only on seed, feed, epoch and index. So a restarted round makes the same batches,
and each rank makes its own samples of a batch.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from cxrloop.plate import PLATE_SHAPE
from learner.data.augment import NUMBERS_PER_VIEW, make_views, normalise, to_image
from learner.data.packed_plates import PackedPlates
from learner.data.plates import label_table, read_plates
from learner.engine import distributed
from learner.engine.step import Batch
from learner.networks.pooling import resize_matrix
from learner.round.manifest import Sample
from learner.round.recipe import Recipe

READER = ThreadPoolExecutor(1, thread_name_prefix="plates")  # reads the next batch


class ImageFeed:
    """Batches of samples; `name` ("unlabelled", "labelled", "t0"...) gives each feed its own random numbers."""

    def __init__(
        self,
        samples: Sequence[Sample],
        recipe: Recipe,
        device: torch.device,
        name: str,
        fixed_order: bool,
        labels: Tensor | None = None,  # (N, F), nan = unknown; None = labels of the samples
        packed: PackedPlates | None = None,  # None = read and resize the plates in every batch
    ) -> None:
        self.samples, self.recipe, self.device = samples, recipe, device
        self.stream = int.from_bytes(name.encode()[:6])
        self.fixed_order = fixed_order  # one order for all epochs, as in the published correction
        self.size = min(recipe.batch, len(samples))
        # labelled feeds keep all samples, in batches of nearly equal size; unlabelled feeds drop the last short batch, as
        # published
        self.batches = -(-len(samples) // recipe.batch) if name != "unlabelled" else len(samples) // self.size
        self.drop = name == "unlabelled"
        self.matrix = resize_matrix(PLATE_SHAPE[0], recipe.image_size).to(device)
        self.labels = label_table(samples) if labels is None else labels
        self.packed = packed
        self._ahead: tuple[tuple[int, ...], Future[Tensor]] | None = None
        self._orders: dict[int, list[np.ndarray]] = {}  # batches of positions, of two epochs

    def order(self, epoch: int) -> list[np.ndarray]:
        """Return the positions of the samples of each batch of an epoch, for all ranks together."""
        if epoch not in self._orders:
            neighbours = {known: order for known, order in self._orders.items() if abs(known - epoch) == 1}
            self._orders = neighbours | {epoch: self._make_order(epoch)}
        return self._orders[epoch]

    def _make_order(self, epoch: int) -> list[np.ndarray]:
        shuffled = self._generator(0 if self.fixed_order else epoch, 0).permutation(len(self.samples))
        if self.drop:
            return list(shuffled[: self.batches * self.size].reshape(self.batches, self.size))
        return np.array_split(shuffled, self.batches)

    def batch(self, epoch: int, index: int) -> Batch:
        """Return this rank's samples of one step; the views are made on the device, part by part."""
        return self.views_of(
            epoch, self.rank_positions(epoch, index), self._stored(epoch, index), self.order(epoch)[index]
        )

    def rank_positions(self, epoch: int, index: int) -> np.ndarray:
        """Return the positions of this rank's samples of a batch; may be empty."""
        chosen = self.order(epoch)[index]
        return chosen[distributed.rank_slice(len(chosen))]

    def views_of(
        self, epoch: int, chosen: np.ndarray, stored: Tensor | None = None, whole: np.ndarray | None = None
    ) -> Batch:
        """Return the samples at these positions with their views of an epoch.

        `stored`: their plates, if read already; `whole`: positions of the samples of all ranks, None = `chosen`.
        """
        images = self._read(chosen) if stored is None else stored

        def views(part: slice) -> list[Tensor]:
            numbers = torch.from_numpy(np.stack([self._numbers(epoch, i) for i in chosen[part]]))
            return make_views(self._images(images[part].to(self.device, non_blocking=True)), numbers, self.recipe)

        return self.as_batch(chosen, views, chosen if whole is None else whole)

    def as_batch(self, chosen: np.ndarray, views: Callable[[slice], list[Tensor]], whole: np.ndarray) -> Batch:
        """Return a batch of the samples at these positions; `whole`: positions of the samples of all ranks."""
        positions = torch.from_numpy(chosen)
        known = (~self.labels[torch.from_numpy(whole)].isnan()).sum().to(self.device)
        return Batch(len(chosen), views, self.labels[positions].to(self.device), positions, len(whole), known)

    def _stored(self, epoch: int, index: int) -> Tensor:
        """Return this rank's plates of a batch in host memory, and start to read those of the next batch."""
        wanted, ahead = (epoch, index, distributed.world_size()), self._ahead
        stored = ahead[1].result() if ahead and ahead[0] == wanted else self._read(self.rank_positions(epoch, index))
        following = (epoch, index + 1) if index + 1 < self.batches else (epoch + 1, 0)
        if not ahead or ahead[0][:2] != following:
            self._ahead = (
                (*following, distributed.world_size()),
                READER.submit(self._read, self.rank_positions(*following)),
            )
        return stored

    def _read(self, chosen: np.ndarray) -> Tensor:
        samples = [self.samples[i] for i in chosen]
        if not samples:
            return torch.empty(0)  # this rank has no sample in this batch
        stored = self.packed.read(samples) if self.packed else read_plates(samples)
        return stored.pin_memory() if self.device.type == "cuda" else stored  # pinned: copied while the GPU computes

    def _images(self, stored: Tensor) -> Tensor:
        return self.packed.images(stored) if self.packed else to_image(stored, self.matrix)

    def unaugmented(self, chosen: np.ndarray) -> Tensor:
        """Return the normalised unaugmented images (B, 1, S, S) of the samples at these positions."""
        return normalise(self._images(self._read(chosen).to(self.device)), self.recipe)

    def _numbers(self, epoch: int, index: int) -> np.ndarray:
        views = 1 + self.recipe.local_views
        return self.uniform_numbers(epoch, index, views * NUMBERS_PER_VIEW).reshape(views, NUMBERS_PER_VIEW)

    def uniform_numbers(self, epoch: int, index: int, count: int) -> np.ndarray:
        """Return the first `count` uniform numbers of a sample in an epoch, float32."""
        return self._generator(epoch, 1 + int(index)).random(count, dtype=np.float32)

    def _generator(self, epoch: int, place: int) -> np.random.Generator:
        return np.random.default_rng([self.recipe.seed, self.stream, epoch, place])
