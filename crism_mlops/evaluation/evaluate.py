"""A predictor over a split -> ScoreTable. Training, `evaluate` and the served model predict here."""

from __future__ import annotations

import csv
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from crism_mlops.config import EvaluateConfig
from crism_mlops.dataset.manifest import Pair
from crism_mlops.dataset.prompts import scene_prompt
from crism_mlops.dataset.views import WHOLE, apply_view
from crism_mlops.errors import EvaluationError
from crism_mlops.evaluation.metrics import METRICS, PROTOCOLS, UndefinedMetricWarning, score

log = logging.getLogger(__name__)


class Model(Protocol):
    """What predicting needs of a model."""

    def predict(self, images: Any, prompts: Sequence[str], seeds: Sequence[int]) -> Any: ...


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """One row a scene: its id, region, kind, and `valid/*` and `thesis/*` figures."""

    rows: tuple[dict[str, Any], ...]

    def means(self, protocol: str, ids: Sequence[str] | None = None) -> dict[str, float]:
        """Mean of each metric over the scenes (or those named in `ids`).

        NaN where any of them is undefined: a mean over fewer scenes would not say so. Raises
        EvaluationError where there is no scene, or a named one was not scored.
        """
        wanted = None if ids is None else set(ids)
        chosen = [r for r in self.rows if wanted is None or r["observation_id"] in wanted]
        missing = sorted((wanted or set()) - {r["observation_id"] for r in chosen})
        if missing or not chosen:
            raise EvaluationError(
                f"no {protocol} scores of {', '.join(missing[:5]) or 'any scene'}; "
                f"{len(self.rows)} scenes were scored; score the same split that is averaged"
            )
        return {name: float(np.mean([r[f"{protocol}/{name}"] for r in chosen])) for name in METRICS}

    def csv(self) -> str:
        """The table as CSV text."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=list(self.rows[0]))
        writer.writeheader()
        writer.writerows(self.rows)
        return buffer.getvalue()


def noise_seed(seed: int, observation_id: str) -> int:
    """The scene's own noise seed, the same for all trials: 0 .. 2^31 - 1."""
    return int.from_bytes(blake2b(f"{seed}/{observation_id}".encode(), digest_size=4).digest(), "big") >> 1


def predict_images(
    model: Model,
    images: Sequence[NDArray[np.float32]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    resolution: int,
    chunk: int,
) -> list[NDArray[np.float32]]:
    """Predictions H x W x 3 float32 in [0, 1] at the size of each image H x W x C in [0, 1].

    A pixel that is 0 in every channel shows no data. Every forward pass holds exactly `chunk`
    images (the last one repeated), so that a prediction has the same bits whatever else is asked.
    """
    import torch
    from torchvision.transforms.v2 import functional as tf

    outputs: list[NDArray[np.float32]] = []
    for start in range(0, len(images), chunk):
        part = list(range(start, min(start + chunk, len(images))))
        padded = part + [part[-1]] * (chunk - len(part))
        inputs = [apply_view(images[i], np.asarray(images[i].any(axis=-1)), WHOLE, resolution)[0] for i in part]
        batch = torch.stack(inputs + [inputs[-1]] * (chunk - len(part)))
        predicted = model.predict(batch, [prompts[i] for i in padded], [seeds[i] for i in padded])
        for i, image in zip(part, predicted, strict=False):
            size = list(images[i].shape[:2])
            native = image if size == [resolution, resolution] else tf.resize(image, size, antialias=True)
            outputs.append(((native + 1.0) / 2.0).clamp(0.0, 1.0).permute(1, 2, 0).contiguous().numpy())
    return outputs


def predict_pairs(
    model: Model, pairs: Sequence[Pair], template: str, config: EvaluateConfig, resolution: int
) -> list[NDArray[np.float32]]:
    """`predict_images` for scenes, a chunk of them in memory: prompts from their metadata, noise from their ids."""
    outputs: list[NDArray[np.float32]] = []
    for start in range(0, len(pairs), config.chunk):
        part = pairs[start : start + config.chunk]
        outputs += predict_images(
            model,
            [p.image for p in part],
            [scene_prompt(template, p.scene) for p in part],
            [noise_seed(config.seed, p.scene.observation_id) for p in part],
            resolution,
            config.chunk,
        )
    return outputs


def score_pairs(
    predictions: Sequence[NDArray[np.float32]],
    pairs: Sequence[Pair],
    protocols: Sequence[str] = PROTOCOLS,
    on_scene: Callable[[int, int], None] = lambda done, total: None,
) -> ScoreTable:
    """Score each prediction against its scene's truth in the named protocols."""
    rows = []
    for done, (prediction, pair) in enumerate(zip(predictions, pairs, strict=True), start=1):
        scene = pair.scene
        row: dict[str, Any] = {"observation_id": scene.observation_id, "region": scene.region, "kind": scene.kind}
        for protocol in protocols:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UndefinedMetricWarning)
                figures = score(prediction, pair.truth, scene.valid, protocol=cast(Any, protocol))
            for warning in caught:
                log.warning("%s (%s): %s", scene.observation_id, protocol, warning.message)
            row |= {f"{protocol}/{name}": figures[name] for name in METRICS}
        rows.append(row)
        on_scene(done, len(pairs))
    return ScoreTable(tuple(rows))


def round_trips(model: Any, pairs: Sequence[Pair], resolution: int) -> list[NDArray[np.float32]]:
    """The truth through the autoencoder at `resolution` and back to native size: the ceiling."""
    from torchvision.transforms.v2 import functional as tf

    outputs = []
    for pair in pairs:
        image, _ = apply_view(pair.truth, pair.scene.valid, WHOLE, resolution)
        decoded = tf.resize(model.round_trip(image[None])[0], list(pair.truth.shape[:2]), antialias=True)
        outputs.append(((decoded + 1.0) / 2.0).clamp(0.0, 1.0).permute(1, 2, 0).contiguous().numpy())
    return outputs
