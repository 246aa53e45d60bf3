"""Validation scenes that a trial stores with what its logged model predicts of them: what a served model must
reproduce before it is promoted, and after."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crism_mlops.dataset.manifest import Manifest
from crism_mlops.errors import TrackingError, one_line
from crism_mlops.evaluation.evaluate import noise_seed
from crism_mlops.scenes.scene import Scene
from crism_mlops.studies.outcome import spread
from crism_mlops.studies.request import RANGES, Request
from crism_mlops.studies.served import Served
from crism_mlops.tracking import Tracker
from crism_mlops.untrusted import parse_json, read_tensors

FILE, INDEX = "stored/scenes.safetensors", "stored/scenes.json"
SCENES = 3
# A hundred trials' stored scenes are then some 20 MB.
SIDE = 64
# On the same machine, and with as many threads, a prediction comes out bit for bit. Elsewhere sums are taken in
# another order, and each denoising step hands the difference on (the tiny model's 15 steps with one thread and with
# two: 3e-6); a GPU's arithmetic differs by more. 1/255 is what a picture's pixel can tell.
TOLERANCE = {"unet": 1e-3, "instruct_pix2pix": 1.0 / 255.0}
Predictor = Callable[[NDArray[np.float32], dict[str, Any]], dict[str, NDArray[Any]]]


@dataclass(frozen=True, slots=True)
class Reproduction:
    """One stored scene predicted again: the largest absolute difference to what is stored (in 0..1; infinite where
    it has another size or is no number), what is tolerated, and whether it is within that."""

    observation_id: str
    largest: float
    tolerance: float
    ok: bool


def log_stored(tracker: Tracker, run_id: str, served: Served, manifest: Manifest) -> None:
    """Log a few validation scenes of a trial, or the SIDE x SIDE pixels of each that show most, with the model's
    prediction of them and all that it was asked."""
    from safetensors.numpy import save

    scenes = spread(manifest.of("validation"), SCENES)
    images = [_crop(served, scene) for scene in scenes]
    # Of an image pair one may be black everywhere.
    shown = [(scene, image) for scene, image in zip(scenes, images, strict=True) if image.any()]
    requests = [_request(served, scene, image) for scene, image in shown]
    arrays: dict[str, NDArray[Any]] = {}
    index = []
    for number, (request, answer) in enumerate(zip(requests, served.answers(requests), strict=True)):
        names = {"image": f"{number}/image", "prediction": f"{number}/prediction"}
        arrays[names["image"]] = request.image.astype(np.float16)
        arrays[names["prediction"]] = np.where(answer.nodata[..., None], np.float32(0.0), answer.scaled)
        asked = {name: getattr(request, name) for name in ("seed", "longitude", "latitude", "location")}
        params = {"bands": list(request.bands), **{name: value for name, value in asked.items() if value is not None}}
        index.append({"observation_id": shown[number][0].observation_id, **names, "params": params})
    kind = served.checkpoint.config.model.kind
    # The index last: where it is, the scenes are.
    tracker.content(run_id, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}), FILE)
    tracker.text(run_id, json.dumps({"tolerance": TOLERANCE[kind], "scenes": index}, indent=1) + "\n", INDEX)


def reproduce(tracker: Tracker, run_id: str, predict: Predictor) -> list[Reproduction]:
    """Predict a run's stored scenes again; `predict(images, params)` is the served model's.

    Raises TrackingError where the run stored none, or what it stored is damaged.
    """
    content = tracker.read(run_id, INDEX)
    arrays_content = tracker.read(run_id, FILE)
    try:
        index, arrays = parse_json(content), read_tensors(arrays_content)
        tolerance = float(index["tolerance"])
        stored = [
            (str(s["observation_id"]), arrays[s["image"]].astype(np.float32), arrays[s["prediction"]], s["params"])
            for s in index["scenes"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise TrackingError(f"run {run_id}: {INDEX} or {FILE} is damaged ({one_line(error)})") from error
    if not stored:
        raise TrackingError(f"run {run_id}: {INDEX} holds no scene that shows anything; nothing can be reproduced")
    found = []
    for observation_id, image, expected, params in stored:
        made = np.asarray(predict(image[None], {**params, "scaled": True})["prediction"])
        largest = float("inf")
        if made.shape == (1, *expected.shape) and np.isfinite(made).all():
            largest = float(np.abs(made[0].astype(np.float64) - expected).max())
        found.append(Reproduction(observation_id, largest, tolerance, largest <= tolerance))
    return found


def _request(served: Served, scene: Scene, image: NDArray[np.float32]) -> Request:
    """A scene as the served model is asked for it, with the noise that evaluation gives it."""
    seed = noise_seed(served.checkpoint.config.evaluate.seed, scene.observation_id)
    known = scene.longitude_deg is not None and scene.latitude_deg is not None
    longitude, latitude = (scene.longitude_deg, scene.latitude_deg) if known else (None, None)
    return Request(
        image, served.bands, seed=seed, longitude=longitude, latitude=latitude, location=scene.region or None
    )


def _crop(served: Served, scene: Scene) -> NDArray[np.float32]:
    """The part of a scene that is stored, H x W x C float32 in the model's bands: float16 values, 0 without data."""
    channels = [scene.band_names.index(name) for name in served.bands]
    rows, columns = _window(scene.valid)
    valid = scene.valid[rows, columns][..., None]
    image = np.where(valid, scene.bands[rows, columns][..., channels], np.float32(0.0)).astype(np.float16)
    # Rounding may have carried a value just out of the range; the next one towards 0 lies within.
    low, high = (np.float32(end) for end in RANGES[served.units])
    outside = (image.astype(np.float32) < low) | (image.astype(np.float32) > high)
    image[outside] = np.nextafter(image[outside], np.float16(0.0))
    return image.astype(np.float32)


def _window(valid: NDArray[np.bool_]) -> tuple[slice, slice]:
    """The SIDE x SIDE pixels (fewer in a smaller scene) that show most data, the first of them."""
    height, width = (min(SIDE, length) for length in valid.shape)
    sums = np.pad(valid.astype(np.int64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    counts = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    top, left = (int(i) for i in np.unravel_index(int(counts.argmax()), counts.shape))
    return slice(top, top + height), slice(left, left + width)
