"""Target image -> where it shows carbonate: one rule for truth and prediction alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crism_mlops.config import DataConfig
from crism_mlops.dataset.variants import inverse_target, target_has_inverse, target_image
from crism_mlops.scenes.scene import Scene

# Pixels of one train scene that the classifier is fitted on.
_PIXELS = 4096
# Which of a target's parameters the mask's own rule looks at; any of them above the threshold is enough.
_DEPTHS = {"car": (0, 1), "cr2": (0, 1)}
DEGREE = 3


@dataclass(frozen=True, slots=True)
class CarbonateRule:
    """A score a pixel, and the threshold from which on a pixel bears carbonate.

    kind "depths": the score is the larger of the target's two band depths, the threshold that of the
    mask's own rule (`data.carbonate`): of car D2300 and BD2500_2, of cr2 MIN2295_2480 and
    MIN2345_2537, which is the half of the rule that the target holds. kind "classifier": logistic
    regression on the target's channels and their products up to degree 3, fitted on the train scenes'
    pixels; mean, scale and weights have a value a feature, threshold is the one of the best F1 on
    those pixels.
    """

    kind: str
    threshold: float
    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    offset: float = 0.0

    def score(self, image: NDArray[np.float32], data: DataConfig) -> NDArray[np.float32]:
        """H x W x 3 target image in [0, 1] -> H x W float32: larger is more likely carbonate."""
        if self.kind == "depths":
            depths = inverse_target(image, data.target, data.target_normalization, data.ranges)
            return np.asarray(depths[..., _DEPTHS[data.target]].max(axis=-1))
        features = (_features(image.reshape(-1, 3)) - np.array(self.mean)) / np.array(self.scale)
        score = features @ np.array(self.weights) + self.offset
        return np.asarray(score, dtype=np.float32).reshape(image.shape[:2])


def carbonate_rule(train: Sequence[Scene], data: DataConfig) -> CarbonateRule | None:
    """The rule for a data section's target; None where train scenes cannot teach one.

    Only the classifier is fitted, on the train scenes alone: for a target without band depths (fal),
    and for one that was stretched image by image. It needs scenes that have a mask, and pixels of
    either kind.
    """
    if data.target in _DEPTHS and target_has_inverse(data.target_normalization):
        first = data.carbonate.supporting_depth if data.target == "car" else data.carbonate.minimum_depth
        return CarbonateRule("depths", first)
    pixels, marks = [], []
    for scene in sorted(train, key=lambda s: s.observation_id):
        if scene.carbonate is None:
            continue
        valid = np.flatnonzero(scene.valid)
        picked = valid[np.linspace(0, len(valid) - 1, min(_PIXELS, len(valid))).astype(int)]
        truth = target_image(scene, data.target, data.target_normalization, data.ranges)
        pixels.append(truth.reshape(-1, 3)[picked])
        marks.append(scene.carbonate.ravel()[picked])
    if not pixels or len(np.unique(mark := np.concatenate(marks))) < 2:
        return None
    return _fitted(_features(np.concatenate(pixels)), mark)


def _fitted(features: NDArray[np.float64], mark: NDArray[np.bool_]) -> CarbonateRule:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import precision_recall_curve

    mean, scale = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-12)
    scaled = (features - mean) / scale
    model = LogisticRegression(C=1.0, max_iter=2000, class_weight="balanced").fit(scaled, mark)
    score = model.decision_function(scaled)
    precision, recall, thresholds = precision_recall_curve(mark, score)
    f1 = 2.0 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = float(thresholds[int(np.argmax(f1[:-1]))])
    return CarbonateRule(
        kind="classifier",
        # The mask is what exceeds the threshold, as in the rule of depths; the best pixel itself counts.
        threshold=float(np.nextafter(np.float32(best), np.float32(-np.inf))),
        mean=tuple(map(float, mean)),
        scale=tuple(map(float, scale)),
        weights=tuple(map(float, model.coef_[0])),
        offset=float(model.intercept_[0]),
    )


def _features(pixels: NDArray[np.floating]) -> NDArray[np.float64]:
    """N x 3 -> N x 19: every product of the channels up to degree 3."""
    from itertools import combinations_with_replacement

    values = pixels.astype(np.float64)
    columns = [
        np.prod(values[:, list(chosen)], axis=1)
        for degree in range(1, DEGREE + 1)
        for chosen in combinations_with_replacement(range(3), degree)
    ]
    return np.column_stack(columns)
