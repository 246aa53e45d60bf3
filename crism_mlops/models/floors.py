"""What every model must beat: copying the input, and a linear map per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crism_mlops.dataset.manifest import Pair


@dataclass(frozen=True, slots=True)
class CopyFloor:
    """The input image as the prediction; means something where both have three like channels."""

    name = "copy"

    def predict(self, pair: Pair) -> NDArray[np.float32]:
        """H x W x 3 float32 in [0, 1]."""
        return pair.image


@dataclass(frozen=True, slots=True)
class LinearFloor:
    """truth = image @ weights + offset, clipped to [0, 1]; weights C x 3, offset 3."""

    weights: tuple[tuple[float, ...], ...]
    offset: tuple[float, ...]
    name = "linear"

    def predict(self, pair: Pair) -> NDArray[np.float32]:
        """H x W x 3 float32 in [0, 1]."""
        linear = pair.image @ np.array(self.weights, dtype=np.float32) + np.array(self.offset, dtype=np.float32)
        return np.clip(linear, 0.0, 1.0).astype(np.float32)


def fit_linear(pairs: Sequence[Pair]) -> LinearFloor:
    """Least squares over the valid pixels of the train scenes."""
    images = np.concatenate([p.image[p.scene.valid] for p in pairs]).astype(np.float64)
    truths = np.concatenate([p.truth[p.scene.valid] for p in pairs]).astype(np.float64)
    design = np.column_stack([images, np.ones(len(images))])
    solution, *_ = np.linalg.lstsq(design, truths, rcond=None)
    return LinearFloor(
        weights=tuple(tuple(map(float, row)) for row in solution[:-1]), offset=tuple(map(float, solution[-1]))
    )
