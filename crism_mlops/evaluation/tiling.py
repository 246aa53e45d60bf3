"""Images larger than a model sees at once: overlapping tiles, and their predictions blended without seams."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Of a tile's side, what it shares with the next one at least.
OVERLAP = 0.25
# Of that overlap, what lies next to a tile's edge and counts for next to nothing: convolutions see no neighbours there.
_MARGIN = 0.25


@dataclass(frozen=True, slots=True)
class Tile:
    """A part of an image, and how much each of its rows and columns counts (float64, 0..1).

    Over all tiles of an image, the products of row and column weights add up to 1 in each pixel.
    """

    rows: slice
    columns: slice
    row_weights: NDArray[np.float64]
    column_weights: NDArray[np.float64]

    @property
    def place(self) -> tuple[slice, slice]:
        """The tile as an index of an image H x W x ..."""
        return self.rows, self.columns

    def add(self, total: NDArray[np.float32], prediction: NDArray[np.float32]) -> None:
        """Add the tile's prediction h x w x K, weighted, to the whole one H x W x K."""
        weights = np.outer(self.row_weights, self.column_weights).astype(np.float32)
        total[self.place] += weights[..., None] * prediction


def tiles(height: int, width: int, side: int, grid: float = 1.0) -> list[Tile]:
    """The tiles of an image, row by row: one for an image that is no larger than `side` x `side`, else all of
    one size, `side` pixels a side (or as many as the image has), at least OVERLAP of `side` shared.

    They begin at multiples of `grid` pixels where that is no longer than a step, but for the last ones, which end
    with the image: what a network pools together is then the same as if it saw the whole.
    """
    if side < 1:
        raise ValueError(f"side is {side}, expected 1 or more")
    return [
        Tile(rows, columns, row_weights, column_weights)
        for rows, row_weights in _parts(height, side, grid)
        for columns, column_weights in _parts(width, side, grid)
    ]


def _parts(length: int, side: int, grid: float) -> list[tuple[slice, NDArray[np.float64]]]:
    """The tiles along one axis and their weights, which add up to 1 in each pixel."""
    size = min(side, length)
    step = max(1, side - int(OVERLAP * side))
    grid = grid if 1.0 <= grid <= step else 1.0
    count = math.ceil((length - size) / max(1, int(grid * int(step / grid)))) + 1
    even = np.linspace(0, length - size, count)
    # Rounded up, no two are further from each other than a step.
    starts = sorted({min(round(math.ceil(place / grid - 1e-9) * grid), length - size) for place in even.tolist()})
    overlap = max(1.0, OVERLAP * side)
    distance = np.minimum(np.arange(size), np.arange(size)[::-1]) + 0.5
    ramp = np.clip((distance - _MARGIN * overlap) / max(overlap * (1.0 - 2.0 * _MARGIN), 0.5), 0.0, 1.0)
    # Smooth at both ends; never 0, as the edge of the image has no other tile.
    window = np.maximum(ramp * ramp * (3.0 - 2.0 * ramp), 1e-6)
    total = np.zeros(length)
    for start in starts:
        total[start : start + size] += window
    return [(slice(s, s + size), window / total[s : s + size]) for s in starts]
