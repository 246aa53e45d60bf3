"""A predictor over a split -> ScoreTable. Training, `evaluate` and the served model predict here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any
from typing import Protocol as Interface

import numpy as np
from numpy.typing import NDArray

from crism_mlops.config import DataConfig, EvaluateConfig
from crism_mlops.dataset.carbonate import CarbonateRule
from crism_mlops.dataset.manifest import Pair
from crism_mlops.dataset.split import region_name
from crism_mlops.dataset.views import WHOLE, apply_view
from crism_mlops.errors import EvaluationError
from crism_mlops.evaluation.carbonate import count
from crism_mlops.evaluation.inference import clusters_of
from crism_mlops.evaluation.metrics import METRICS, PROTOCOLS, Protocol, score_scenes
from crism_mlops.evaluation.scores import ScoreTable
from crism_mlops.scenes.scene import Scene

log = logging.getLogger(__name__)


class Model(Interface):
    """What predicting needs of a model."""

    def predict(self, images: Any, prompts: Sequence[str], seeds: Sequence[int]) -> Any: ...


@dataclass(frozen=True, slots=True)
class Predicted:
    """Predictions of some scenes, H x W x 3 float32 in [0, 1] at native size, in their order.

    Of several draws of a diffusion model images holds the mean; spreads the standard deviation
    between draws (H x W x 3 float32, one draw fewer as divisor), and draw_rmse each draw's own RMSE
    (0..255, valid pixels). Both are None where there is one draw. halves: the same deviation among the
    first half of the draws and among the second, of valid pixels only (2 x pixels x 3); None for
    fewer than four draws.
    """

    images: Sequence[NDArray[np.float32]]
    spreads: Sequence[NDArray[np.float32]] | None = None
    draw_rmse: Sequence[tuple[float, ...]] | None = None
    halves: Sequence[NDArray[np.float32]] | None = None


def noise_seed(seed: int, observation_id: str) -> int:
    """The scene's own noise seed, the same for all trials: 0 .. 2^31 - 1."""
    return int.from_bytes(blake2b(f"{seed}/{observation_id}".encode(), digest_size=4).digest(), "big") >> 1


def draw_seed(seed: int, draw: int) -> int:
    """The seed of one of several draws from that of the first: whoever knows that one can repeat all of them."""
    return seed if draw == 0 else noise_seed(seed, f"draw {draw}")


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
    model: Model,
    pairs: Sequence[Pair],
    prompt: Callable[[Scene], str],
    config: EvaluateConfig,
    resolution: int,
    prompts: Sequence[str] | None = None,
) -> Predicted:
    """`predict_images` for scenes, a chunk of them in memory: prompts from their metadata (or `prompts` as
    given), noise from their ids."""
    images: list[NDArray[np.float32]] = []
    spreads: list[NDArray[np.float32]] = []
    draw_rmse: list[tuple[float, ...]] = []
    halves: list[NDArray[np.float32]] = []
    for start in range(0, len(pairs), config.chunk):
        part = pairs[start : start + config.chunk]
        words = [prompt(p.scene) for p in part] if prompts is None else prompts[start : start + len(part)]
        draws = [
            predict_images(
                model,
                [p.image for p in part],
                words,
                [draw_seed(noise_seed(config.seed, p.scene.observation_id), draw) for p in part],
                resolution,
                config.chunk,
            )
            for draw in range(config.draws)
        ]
        if config.draws == 1:
            images += draws[0]
            continue
        for pair, *drawn in zip(part, *draws, strict=True):
            stack = np.stack(drawn)
            images.append(stack.mean(axis=0))
            spreads.append(stack.std(axis=0, ddof=1))
            errors = (stack - pair.truth)[:, pair.scene.valid].astype(np.float64)
            draw_rmse.append(tuple(255.0 * np.sqrt((errors**2).mean(axis=(1, 2)))))
            if config.draws >= 4:
                shown = stack[:, pair.scene.valid]
                halves.append(np.stack([part.std(axis=0, ddof=1) for part in np.array_split(shown, 2)]))
    return Predicted(images) if config.draws == 1 else Predicted(images, spreads, draw_rmse, halves or None)


def score_pairs(
    predictions: Predicted,
    pairs: Sequence[Pair],
    protocols: Sequence[Protocol] = PROTOCOLS,
    on_scene: Callable[[int, int], None] = lambda done, total: None,
    rule: CarbonateRule | None = None,
    data: DataConfig | None = None,
    device: str = "cpu",
) -> ScoreTable:
    """Score each prediction against its scene's truth in the named protocols.

    With `rule` and the data section that it is for, carbonate is counted in scenes that have a mask.
    What is undefined for a scene is logged. Raises EvaluationError for numbers of predictions and
    scenes that differ.
    """
    images = predictions.images
    if len(images) != len(pairs):
        raise EvaluationError(f"{len(images)} predictions for {len(pairs)} scenes; expected one each")
    # Each pair is rendered when it is asked for: once here.
    scenes, truths = zip(*((pair.scene, pair.truth) for pair in pairs), strict=True) if images else ((), ())
    scored = score_scenes(images, truths, [s.valid for s in scenes], protocols, device=device, on_scene=on_scene)
    rows: list[dict[str, Any]] = []
    counts, ceilings = {}, {}
    for index, (scene, cluster, one) in enumerate(zip(scenes, clusters_of(scenes), scored, strict=True)):
        identity = scene.observation_id
        row: dict[str, Any] = {
            "observation_id": identity, "region": region_name(scene), "kind": scene.kind, "cluster": cluster,
            "truth_digest": truth_digest(truths[index], scene.valid), **one.figures
        }  # fmt: skip
        # A constant channel is usual in a floor; what has no figure for the whole scene spoils a mean.
        if lacking := [f"{key}: {why}" for key, why in one.undefined.items() if key.split("/")[1] in METRICS]:
            log.warning("%s: NaN for %s", identity, "; ".join(lacking))
        if predictions.draw_rmse is not None:
            row |= {"draws/rmse_mean": float(np.mean(predictions.draw_rmse[index])),
                    "draws/rmse_variance": float(np.var(predictions.draw_rmse[index], ddof=1))}  # fmt: skip
        if rule is not None and data is not None and scene.carbonate is not None:
            counts[identity] = count(images[index], scene.carbonate, scene.valid, rule, data)
            ceilings[identity] = count(truths[index], scene.carbonate, scene.valid, rule, data)
        rows.append(row)
    order = sorted(range(len(rows)), key=lambda i: rows[i]["observation_id"])
    return ScoreTable(tuple(rows[i] for i in order), counts, ceilings)


def truth_digest(truth: NDArray[np.float32], valid: NDArray[np.bool_]) -> str:
    """16 hex digits of what a prediction is held against: the truth's valid pixels (of H x W x 3), their places."""
    content = blake2b(repr(valid.shape).encode(), digest_size=8)
    content.update(np.packbits(valid).tobytes())
    content.update(truth[valid].astype("<f4", copy=False).tobytes())
    return content.hexdigest()


@dataclass(frozen=True, slots=True)
class Calibration:
    """Whether the spread between draws tells the error of their mean.

    bins: RMS predicted standard deviation, RMS error (both 0..255) and number of values, by tenths of
    the deviation among the first half of the draws; the predicted one is that of the second half.
    (Sorted by the very deviation that is shown, a calibrated model's bins would lie off the line, as few
    draws' deviation is mostly noise.) One bin of all values for fewer than four draws. spread, error:
    RMS of both over all; coverage: share of the values whose truth lies within the 95 % interval that
    the draws predict. The predicted deviation is that of truth minus mean of k draws, were truth one
    draw more: s sqrt(1 + 1/k).
    """

    bins: tuple[tuple[float, float, int], ...]
    spread: float
    error: float
    coverage: float


def calibration(predictions: Predicted, pairs: Sequence[Pair]) -> Calibration | None:
    """Calibration over valid pixels and channels; None where there is one draw."""
    if predictions.spreads is None or predictions.draw_rmse is None:
        return None
    from scipy.stats import t

    draws = len(predictions.draw_rmse[0])
    # Of the truth minus a mean of k draws, were the truth one draw more.
    scale = 255.0 * np.sqrt(1.0 + 1.0 / draws)
    spreads, errors = [], []
    for index, (image, spread) in enumerate(zip(predictions.images, predictions.spreads, strict=True)):
        pair = pairs[index]
        spreads.append(scale * spread[pair.scene.valid].ravel())
        errors.append(255.0 * np.abs(image - pair.truth)[pair.scene.valid].ravel())
    predicted, error = np.concatenate(spreads), np.concatenate(errors)
    parts, shown = [np.arange(len(error))], predicted
    if predictions.halves is not None:
        first, second = (np.concatenate([half[i].ravel() for half in predictions.halves]) for i in (0, 1))
        parts, shown = np.array_split(np.argsort(first, kind="stable"), 10), scale * second
    bins = tuple((_rms(shown[part]), _rms(error[part]), len(part)) for part in parts if len(part))
    within = error <= t.ppf(0.975, draws - 1) * predicted
    return Calibration(bins, _rms(predicted), _rms(error), float(within.mean()))


def _rms(values: NDArray[np.floating[Any]]) -> float:
    return float(np.sqrt((values.astype(np.float64) ** 2).mean()))


def round_trips(model: Any, pairs: Sequence[Pair], resolution: int) -> Predicted:
    """The truth through the autoencoder at `resolution` and back to native size: the ceiling."""
    from torchvision.transforms.v2 import functional as tf

    outputs = []
    for pair in pairs:
        image, _ = apply_view(pair.truth, pair.scene.valid, WHOLE, resolution)
        seen, _ = apply_view(pair.image, pair.scene.valid, WHOLE, resolution)
        decoded = tf.resize(model.round_trip(image[None], seen[None])[0], list(pair.truth.shape[:2]), antialias=True)
        outputs.append(((decoded + 1.0) / 2.0).clamp(0.0, 1.0).permute(1, 2, 0).contiguous().numpy())
    return Predicted(outputs)
