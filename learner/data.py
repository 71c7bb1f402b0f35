"""Films to batches: reads plates, and hands out the views of any batch of any pass, always the same ones.

A film's random numbers come from (seed, feed, pass, index) alone; nothing depends on what was read before, so a batch
can be made again after a crash. Knows no labels' meaning and no network.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from learner.distill import Batch
from learner.recipe import Recipe
from learner.round_dir import PLATE_SHAPE, Film, read_plate
from learner.views import NUMBERS, make_views, resize_matrix, to_image

READER = ThreadPoolExecutor(1, thread_name_prefix="plates")  # reads one batch ahead


class Films:
    """A feed over films. `name` ("unlabelled", "labelled", "t0") separates the random numbers of feeds."""

    def __init__(
        self,
        films: Sequence[Film],
        recipe: Recipe,
        device: torch.device,
        name: str,
        fixed_order: bool,
        labels: Tensor | None = None,  # (films, findings), nan = unknown; None = the films' own
    ) -> None:
        self.films, self.recipe, self.device = films, recipe, device
        self.stream = int.from_bytes(name.encode()[:6])
        self.fixed_order = fixed_order  # the published correction goes through the labelled films in one order
        self.size = min(recipe.batch, len(films))
        # labelled passes keep every film, in even batches; unlabelled ones drop the last short batch, as published
        self.batches = -(-len(films) // recipe.batch) if name != "unlabelled" else len(films) // self.size
        self.drop = name == "unlabelled"
        self.matrix = resize_matrix(PLATE_SHAPE[0], recipe.image_size).to(device)
        self.labels = label_table(films) if labels is None else labels
        self._ahead: dict[tuple[int, int], Future[Tensor]] = {}

    def order(self, sweep: int) -> list[np.ndarray]:
        """Indices of the films of each batch of this pass."""
        shuffled = self._generator(0 if self.fixed_order else sweep, 0).permutation(len(self.films))
        if self.drop:
            return list(shuffled[: self.batches * self.size].reshape(self.batches, self.size))
        return np.array_split(shuffled, self.batches)

    def batch(self, sweep: int, index: int) -> Batch:
        """The films of one step; their views are made on the device, part by part."""
        chosen = self.order(sweep)[index]
        plates = self._plates(sweep, index)
        following = (sweep, index + 1) if index + 1 < self.batches else (sweep + 1, 0)
        self._ahead = {
            following: READER.submit(read_plates, [self.films[i] for i in self.order(following[0])[following[1]]])
        }
        numbers = torch.from_numpy(np.stack([self._numbers(sweep, i) for i in chosen]))

        def views(part: slice) -> list[Tensor]:
            images = to_image(plates[part].to(self.device), self.matrix)
            return make_views(images, numbers[part], self.recipe)

        index = torch.from_numpy(chosen)
        return Batch(len(chosen), views, self.labels[index].to(self.device))

    def _plates(self, sweep: int, index: int) -> Tensor:
        waiting = self._ahead.pop((sweep, index), None)
        return waiting.result() if waiting else read_plates([self.films[i] for i in self.order(sweep)[index]])

    def _numbers(self, sweep: int, index: int) -> np.ndarray:
        views = 1 + self.recipe.local_views
        return self._generator(sweep, 1 + int(index)).random((views, NUMBERS), dtype=np.float32)

    def _generator(self, sweep: int, place: int) -> np.random.Generator:
        return np.random.default_rng([self.recipe.seed, self.stream, sweep, place])


def label_table(films: Sequence[Film]) -> Tensor:
    """float32 (films, findings), nan = unknown."""
    return torch.tensor([[float("nan") if v is None else float(v) for v in f.labels] for f in films])


def read_plates(films: Sequence[Film]) -> Tensor:
    """uint8 (B, 512, 512)."""
    return torch.from_numpy(np.stack([read_plate(f.plate) for f in films]))
