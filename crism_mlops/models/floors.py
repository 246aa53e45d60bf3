"""What every model must beat: copying the input, the train mean, a linear and a boosted map per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from crism_mlops.dataset.manifest import Pair
from crism_mlops.errors import ModelError

# Of all train scenes; more hardly change what a hundred trees learn.
BOOSTED_PIXELS = 100_000


class Floor(Protocol):
    """What all of them do."""

    def predict(self, pair: Pair) -> NDArray[np.float32]: ...


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


@dataclass(frozen=True, slots=True)
class MeanFloor:
    """The mean of the truth over the train scenes' valid pixels, everywhere; mean 3 values in [0, 1]."""

    mean: tuple[float, ...]
    name = "mean"

    def predict(self, pair: Pair) -> NDArray[np.float32]:
        """H x W x 3 float32 in [0, 1]."""
        return np.broadcast_to(np.array(self.mean, dtype=np.float32), pair.truth.shape).copy()


@dataclass(frozen=True, slots=True)
class BoostedFloor:
    """Gradient-boosted trees per pixel, one ensemble a channel of the truth, clipped to [0, 1]."""

    ensembles: tuple[Any, ...]
    name = "boosted"

    def predict(self, pair: Pair) -> NDArray[np.float32]:
        """H x W x 3 float32 in [0, 1]; 0 without data."""
        valid = pair.scene.valid
        image = np.zeros(pair.truth.shape, dtype=np.float32)
        pixels = pair.image[valid]
        image[valid] = np.column_stack([ensemble.predict(pixels) for ensemble in self.ensembles])
        return np.clip(image, 0.0, 1.0)


def fit_mean(pairs: Sequence[Pair]) -> MeanFloor:
    """Mean over all valid pixels of the train scenes. Raises ModelError where no pixel is valid."""
    sums, count = np.zeros(3), 0
    for pair in pairs:
        truth = pair.truth[pair.scene.valid]
        sums += truth.sum(axis=0, dtype=np.float64)
        count += len(truth)
    if not count:
        raise _nothing_to_fit("mean", pairs)
    return MeanFloor(tuple(map(float, sums / count)))


def fit_boosted(pairs: Sequence[Pair]) -> BoostedFloor:
    """Histogram gradient boosting (scikit-learn) on about BOOSTED_PIXELS valid pixels, evenly spread over
    the train scenes. Raises ModelError where no pixel is valid."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    share = max(1, BOOSTED_PIXELS // max(1, len(pairs)))
    images, truths = [], []
    for pair in pairs:
        valid = np.flatnonzero(pair.scene.valid)
        if len(valid):
            picked = valid[np.linspace(0, len(valid) - 1, min(share, len(valid))).astype(int)]
            images.append(pair.image.reshape(-1, pair.image.shape[-1])[picked])
            truths.append(pair.truth.reshape(-1, 3)[picked])
    if not images:
        raise _nothing_to_fit("boosted", pairs)
    image, truth = np.concatenate(images), np.concatenate(truths)
    ensembles = [
        HistGradientBoostingRegressor(max_iter=100, early_stopping=False, random_state=0).fit(image, channel)
        for channel in truth.T
    ]
    return BoostedFloor(tuple(ensembles))


def _nothing_to_fit(name: str, pairs: Sequence[Pair]) -> ModelError:
    return ModelError(f"the {name} floor has no valid pixel to fit in {len(pairs)} train scenes; check their masks")


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
        raise _nothing_to_fit("linear", pairs)
    solution, *_ = np.linalg.lstsq(triangle[:, : channels + 1], triangle[:, channels + 1 :], rcond=None)
    return LinearFloor(
        weights=tuple(tuple(map(float, row)) for row in solution[:-1]), offset=tuple(map(float, solution[-1]))
    )
