"""What every model must beat: copying the input, and a linear map per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crism_mlops.dataset.manifest import Pair
from crism_mlops.errors import ModelError


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
    """Least squares over the valid pixels of the train scenes, one scene at a time.

    The triangle of a QR decomposition stands for all pixels so far: it holds (C + 4)^2 numbers, not
    the hundreds of millions of pixels of a full study. Raises ModelError where no pixel is valid.
    """
    channels = pairs[0].image.shape[-1]
    triangle = np.zeros((0, channels + 4))
    for pair in pairs:
        image, truth = (x[pair.scene.valid].astype(np.float64) for x in (pair.image, pair.truth))
        rows = np.column_stack([image, np.ones(len(image)), truth])
        triangle = np.asarray(np.linalg.qr(np.vstack([triangle, rows]), mode="r"))
    if not triangle.any():
        raise ModelError(f"the linear floor has no valid pixel to fit in {len(pairs)} train scenes; check their masks")
    solution, *_ = np.linalg.lstsq(triangle[:, : channels + 1], triangle[:, channels + 1 :], rcond=None)
    return LinearFloor(
        weights=tuple(tuple(map(float, row)) for row in solution[:-1]), offset=tuple(map(float, solution[-1]))
    )
