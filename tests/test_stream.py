"""Cubes read in pieces, ahead of the work on them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crism_mlops.errors import ProductError
from crism_mlops.products.mtrdr import Product, open_product
from crism_mlops.products.stream import pieces, row_blocks

Write = Callable[..., Path]
SHAPE = (7, 5, 11)
BANDS = [[0], [10], [2, 3, 4, 8, 9], list(range(11)), [], [9, 1]]


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("crism-read")]


@pytest.fixture
def cube() -> np.ndarray:
    cube = np.random.default_rng(0).uniform(0.0, 1.0, SHAPE).astype(np.float32)
    cube[0, 0] = 65535.0
    cube[3, 2, 4] = 65535.0
    return cube


@pytest.mark.parametrize("size", [1, 100, 333, 1 << 20])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8"])
@pytest.mark.parametrize("interleave", ["bsq", "bil", "bip"])
def test_blocks_and_pieces_are_what_read_reads(
    write_envi: Write, tmp_path: Path, cube: np.ndarray, interleave: str, dtype: str, size: int
) -> None:
    product = open_product(write_envi(tmp_path / "frt", cube, interleave=interleave, dtype=dtype, offset=13))
    for bands in BANDS:
        expected = product.read(bands) if bands else np.empty((7, 5, 0), np.float32)
        kept = list(row_blocks(product, bands, size))
        if bands:
            found = np.concatenate([block for _, block in kept])
            np.testing.assert_array_equal(found, expected)
            assert [rows.start for rows, _ in kept] == [0, *(rows.stop for rows, _ in kept[:-1])]
        together = np.full(expected.shape, np.nan, np.float32)
        for piece in pieces(product, bands, size):
            values = product.physical(piece.raw, bands[piece.bands])
            together[piece.rows, :, piece.bands] = values
        np.testing.assert_array_equal(together, expected)
    assert not readers()


def test_pieces_follow_the_order_on_disk(write_envi: Write, tmp_path: Path, cube: np.ndarray) -> None:
    product = open_product(write_envi(tmp_path / "frt", cube))
    plane = 7 * 5 * 4
    assert [(p.rows, p.bands) for p in pieces(product, [1, 2, 5], 2 * plane)] == [
        (slice(0, 7), slice(0, 2)), (slice(0, 7), slice(2, 3))
    ]  # fmt: skip
    assert [(p.rows.start, p.bands.start) for p in pieces(product, [1, 2], 4 * 20)] == [(0, 0), (4, 0), (0, 1), (4, 1)]


def test_the_reader_ends_when_nobody_wants_more(write_envi: Write, tmp_path: Path, cube: np.ndarray) -> None:
    product = open_product(write_envi(tmp_path / "frt", cube))
    blocks = row_blocks(product, [0, 1], 40)
    next(blocks)
    assert readers()
    blocks.close()  # type: ignore[attr-defined]
    assert not readers()
    blocks = row_blocks(product, [0, 1], 40)
    next(blocks)
    with pytest.raises(KeyboardInterrupt):
        blocks.throw(KeyboardInterrupt())  # type: ignore[attr-defined]
    assert not readers()


def test_a_file_that_shrinks_is_told(write_envi: Write, tmp_path: Path, cube: np.ndarray) -> None:
    product = open_product(write_envi(tmp_path / "frt", cube))
    with product.path.open("r+b") as handle:
        handle.truncate(100)
    with pytest.raises(ProductError, match="ends where more data should be"):
        list(row_blocks(product, [0, 10], 40))
    product.path.unlink()
    with pytest.raises(ProductError, match="cannot be read"):
        list(row_blocks(product, [0], 40))
    assert not readers()


def test_a_block_is_the_callers_own(write_envi: Write, tmp_path: Path, cube: np.ndarray) -> None:
    product: Product = open_product(write_envi(tmp_path / "frt", cube))
    blocks = [block for _, block in row_blocks(product, [0, 1], 40)]
    assert not any(np.shares_memory(a, b) for i, a in enumerate(blocks) for b in blocks[i + 1 :])
    blocks[0][:] = 5.0
    np.testing.assert_array_equal(np.concatenate(blocks[1:]), product.read([0, 1])[len(blocks[0]) :])
