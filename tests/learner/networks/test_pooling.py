"""Pooling: cells of an image, mirrored cells, and contributions that add up."""

import pytest
import torch

from learner.networks.pooling import (
    CELLS,
    WIDTHS,
    cell_means,
    cell_weights,
    mirrored_cell_weights,
    patch_contributions,
    pool_tokens,
    spread_weights,
)

torch.set_num_threads(1)


@pytest.mark.parametrize(("side", "cells"), [(16, 4), (512, 24), (10, 4), (3, 4)])
def test_each_cell_is_a_mean_of_the_positions_that_it_touches(side, cells):
    weights = cell_weights(side, cells)
    torch.testing.assert_close(weights.sum(1), torch.ones(cells))
    for row, weight in enumerate(weights):
        inside = weight.nonzero()[:, 0]
        assert inside[0] == row * side // cells
        assert inside[-1] + 1 == -(-(row + 1) * side // cells)


def test_cell_means_are_block_means_where_the_sides_divide():
    features = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cell_means(features), torch.nn.functional.avg_pool2d(features, 4))


@pytest.mark.parametrize("side", [8, 16, 37])
def test_spreading_a_map_keeps_its_sum(side):
    maps, weights = torch.rand(2, 24, 24, generator=torch.Generator().manual_seed(0)), spread_weights(24, side)
    moved = weights @ maps @ weights.T
    assert moved.shape == (2, side, side)
    torch.testing.assert_close(moved.sum((1, 2)), maps.sum((1, 2)))


def test_the_grid_embedding_of_an_image_and_its_mirror_image_is_the_same():
    patches = torch.randn(2, 8, 8, 5, generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([torch.zeros(2, 1, 5), patches.flatten(1, 2)], 1)
    mirrored = torch.cat([torch.zeros(2, 1, 5), patches.flip(2).flatten(1, 2)], 1)
    embedding = pool_tokens(tokens, "grid", 1)
    assert embedding.shape == (2, 5 * WIDTHS["grid"])
    torch.testing.assert_close(embedding, pool_tokens(mirrored, "grid", 1))


def test_the_grid_embedding_separates_upper_and_lower_places():
    weights = mirrored_cell_weights(8, 8).reshape(CELLS, CELLS // 2, 8, 8)
    assert weights[0, :, :2].sum() == pytest.approx(2)
    assert weights[0, :, 2:].sum() == 0


@pytest.mark.parametrize("pool", ["mean", "grid"])
def test_contributions_of_the_patches_add_up_to_the_embedding_along_a_direction(pool):
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 1 + 36, 5, generator=draw)
    embedding = pool_tokens(tokens, pool, 1)
    directions = torch.randn(2, 3, embedding.shape[1], generator=draw)
    maps = patch_contributions(tokens[:, 1:], directions, pool)
    assert maps.shape == (2, 3, 36)
    torch.testing.assert_close(maps.sum(-1), (directions @ embedding[..., None])[..., 0], rtol=1e-4, atol=1e-4)
