"""How well carbonates are found: pixel counts a scene, and what follows from their sums."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crism_mlops.config import DataConfig
from crism_mlops.dataset.carbonate import CarbonateRule

# Scores are counted in bins about the threshold: in units of a band depth of 0.01, or of the classifier's logit.
BINS, _REACH, _DEPTH_UNIT = 512, 8.0, 0.01
FIGURES = ("precision", "recall", "iou", "f1", "ap", "area")
COUNTS = ("hit", "predicted", "true", "pixels")


@dataclass(frozen=True, slots=True)
class Counts:
    """Pixels of one scene (or of several, added up).

    hit: carbonate in truth and prediction; predicted, true: in one of them; pixels: valid ones.
    curve: 2 x BINS, valid pixels by score, with carbonate in truth and without.
    """

    hit: float
    predicted: float
    true: float
    pixels: float
    curve: NDArray[np.float64]

    def vector(self) -> NDArray[np.float64]:
        """COUNTS, then the curve, flat: what is added up over scenes."""
        return np.concatenate([[self.hit, self.predicted, self.true, self.pixels], self.curve.ravel()])


def count(
    image: NDArray[np.float32],
    carbonate: NDArray[np.bool_],
    valid: NDArray[np.bool_],
    rule: CarbonateRule,
    data: DataConfig,
) -> Counts:
    """Carbonate in a target image H x W x 3 in [0, 1] against the true mask H x W, on valid pixels."""
    score = rule.score(image, data)[valid]
    truth = carbonate[valid]
    found = score > rule.threshold
    unit = _DEPTH_UNIT if rule.kind == "depths" else 1.0
    bins = np.clip(((score - rule.threshold) / unit + _REACH) / (2.0 * _REACH) * BINS, 0, BINS - 1).astype(int)
    curve = np.stack([np.bincount(bins[truth], minlength=BINS), np.bincount(bins[~truth], minlength=BINS)])
    return Counts(
        int((found & truth).sum()), int(found.sum()), int(truth.sum()), int(valid.sum()), curve.astype(np.float64)
    )


def figure(name: str, totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """One of FIGURES from added `Counts.vector`s (... x M); NaN where there is nothing to divide by.

    precision, recall, IoU and F1 of pixels; ap: average precision, the area below the curve of
    precision over recall (scikit-learn's, to the bins' width); area: predicted minus true
    carbonate as a share of the valid pixels.
    """
    hit, predicted, true, pixels = (totals[..., i] for i in range(4))
    with np.errstate(invalid="ignore", divide="ignore"):
        if name == "precision":
            return np.asarray(hit / predicted)
        if name == "recall":
            return np.asarray(hit / true)
        if name == "iou":
            return np.asarray(hit / (predicted + true - hit))
        if name == "f1":
            return np.asarray(2.0 * hit / (predicted + true))
        if name == "area":
            return np.asarray((predicted - true) / pixels)
        positive, negative = totals[..., 4 : 4 + BINS][..., ::-1], totals[..., 4 + BINS :][..., ::-1]
        # Within a bin the two kinds of pixel are evenly mixed: the precision halfway through it stands for it.
        above = positive.cumsum(axis=-1) - 0.5 * positive
        below = negative.cumsum(axis=-1) - 0.5 * negative
        precision = above / np.maximum(above + below, 0.5)
        return np.asarray((positive * precision).sum(axis=-1) / true)
