"""Tiles: every pixel is covered, weights add up to 1, and what does not depend on neighbours comes out as it is."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crism_mlops.evaluation.tiling import OVERLAP, tiles


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 128), st.floats(0.5, 100.0))
@settings(max_examples=60, deadline=None)
def test_weights_add_up_to_one(height: int, width: int, side: int, grid: float) -> None:
    found = tiles(height, width, side, grid)
    total = np.zeros((height, width))
    for tile in found:
        weights = np.outer(tile.row_weights, tile.column_weights)
        assert weights.shape == total[tile.place].shape == (min(height, side), min(width, side))
        assert weights.min() > 0.0
        total[tile.place] += weights
    np.testing.assert_allclose(total, 1.0, rtol=0, atol=1e-12)


def test_tiles_begin_where_a_network_s_coarse_pixels_do() -> None:
    assert [tile.rows.start for tile in tiles(300, 1, 96, 32)] == [0, 64, 128, 160, 204]
    assert [tile.rows.start for tile in tiles(100, 1, 40, 37.3)] == [0, 30, 60], "a grid longer than a step is none"


@given(st.integers(1, 500), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_neighbours_share_a_quarter(length: int, side: int) -> None:
    starts = [tile.rows.start for tile in tiles(length, 1, side)]
    assert starts[0] == 0
    assert starts[-1] == max(0, length - side)
    # (Of one pixel nothing can be shared; places are whole pixels, so one may be lacking.)
    assert all(0 < b - a <= max(1, side - int(OVERLAP * side) + 1) for a, b in pairwise(starts))


@pytest.mark.parametrize("shape", [(1, 1), (40, 64), (64, 64), (64, 3)])
def test_a_small_image_is_one_tile_and_keeps_its_bits(shape: tuple[int, int]) -> None:
    (tile,) = tiles(*shape, 64)
    image = np.random.default_rng(0).random((*shape, 3), dtype=np.float32)
    total = np.zeros_like(image)
    tile.add(total, image)
    np.testing.assert_array_equal(total, image)


def test_predictions_per_pixel_come_out_as_they_are() -> None:
    image = np.random.default_rng(0).random((150, 97, 3), dtype=np.float32)
    total = np.zeros_like(image)
    for tile in tiles(150, 97, 40):
        tile.add(total, image[tile.place])
    np.testing.assert_allclose(total, image, rtol=0, atol=1e-6)


def test_no_seam_where_tiles_differ() -> None:
    """Tiles that disagree by 1: the blend goes from one to the other in small steps."""
    total = np.zeros((64, 180, 1), dtype=np.float32)
    found = tiles(64, 180, 64)
    for number, tile in enumerate(found):
        tile.add(total, np.full((64, 64, 1), number % 2, dtype=np.float32))
    assert len(found) > 2
    assert total.min() == 0.0
    assert total.max() == 1.0
    assert np.abs(np.diff(total, axis=1)).max() < 0.25


def test_a_side_of_nothing() -> None:
    with pytest.raises(ValueError, match="side is 0"):
        tiles(4, 4, 0)
