"""What a trial stores of validation scenes: small, exact in float16, and reproduced by the served model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save
from served_models import Recorder, card, recording
from trackers import new_tracker, small_scenes

from crism_mlops.config import SplitConfig
from crism_mlops.dataset.manifest import Manifest, build_manifest
from crism_mlops.errors import TrackingError
from crism_mlops.evaluation.evaluate import noise_seed
from crism_mlops.registry.pyfunc import ServedModel
from crism_mlops.scenes.scene import Scene
from crism_mlops.studies.outcome import spread
from crism_mlops.studies.served import Served
from crism_mlops.studies.stored import FILE, INDEX, SCENES, SIDE, log_stored, reproduce
from crism_mlops.tracking import Tracker


@pytest.fixture
def tracker(tmp_path: Path) -> Tracker:
    return new_tracker(tmp_path)


def manifest_of(served: Served, scenes: list[Scene]) -> Manifest:
    return build_manifest(scenes, served.checkpoint.config.data, SplitConfig(validation=0.3, test=0.3))


def predictor(served: Served) -> Any:
    model = ServedModel()
    model.served = served
    return lambda images, params: model.predict(None, images, params)


def stored(tracker: Tracker, served: Served, scenes: list[Scene]) -> str:
    run_id = tracker.start("trial", "trial", {}, {})
    log_stored(tracker, run_id, served, manifest_of(served, scenes))
    return run_id


def test_stored_scenes_are_reproduced(tracker: Tracker) -> None:
    served, _ = recording()
    scenes = small_scenes(16, side=SIDE + 16)
    for scene in scenes:
        scene.valid.flags.writeable = True
        scene.valid[: SIDE + 8, :40] = False
    run_id = stored(tracker, served, scenes)
    validation = {s.observation_id: s for s in manifest_of(served, scenes).of("validation")}
    index = json.loads(tracker.read(run_id, INDEX))
    assert len(index["scenes"]) == SCENES
    arrays = load(tracker.read(run_id, FILE))
    for entry in index["scenes"]:
        scene = validation[entry["observation_id"]]
        assert entry["params"] == {
            "bands": list(served.bands), "seed": noise_seed(4, scene.observation_id), "longitude": 10.0,
            "latitude": -5.0, "location": "nili_fossae",
        }  # fmt: skip
        image, prediction = arrays[entry["image"]], arrays[entry["prediction"]]
        assert (image.shape, image.dtype) == ((SIDE, SIDE, 3), np.float16)
        assert (prediction.shape, prediction.dtype) == ((SIDE, SIDE, 3), np.float32)
        # The part that shows most is the lower right one.
        channels = [scene.band_names.index(name) for name in served.bands]
        shown = np.where(scene.valid[..., None], scene.bands[..., channels], 0.0)[16:, 16:]
        np.testing.assert_array_equal(image, shown.astype(np.float16))
    assert sum(len(tracker.read(run_id, file)) for file in (FILE, INDEX)) < 300_000
    found = reproduce(tracker, run_id, predictor(served))
    assert [r.observation_id for r in found] == [entry["observation_id"] for entry in index["scenes"]]
    assert all(r.ok and r.largest == 0.0 for r in found)


def test_another_model_does_not_reproduce_them(tracker: Tracker) -> None:
    served, _ = recording()
    run_id = stored(tracker, served, small_scenes(16))

    class Other(Recorder):
        def predict(self, images: Any, prompts: Any, seeds: Any) -> Any:
            return super().predict(images, prompts, seeds) + 0.01

    found = reproduce(tracker, run_id, predictor(Served(Other(), served.checkpoint)))  # type: ignore[arg-type]  # it predicts
    assert [r.ok for r in found] == [False] * SCENES
    assert found[0].largest == pytest.approx(0.005, abs=1e-6)

    def broken(images: Any, params: Any) -> Any:
        return {"prediction": np.full((*images.shape[:3], 3), np.nan)}

    assert [(r.ok, r.largest) for r in reproduce(tracker, run_id, broken)] == [(False, float("inf"))] * SCENES
    small = reproduce(tracker, run_id, lambda images, params: {"prediction": np.zeros((1, 2, 2, 3))})
    assert not any(r.ok for r in small)


def test_values_at_the_ends_of_the_range(tracker: Tracker) -> None:
    """float16 rounds 1.2 up and -0.02 down, out of what the model takes."""
    served, _ = recording()
    scenes = small_scenes(16)
    for scene in scenes:
        scene.bands.flags.writeable = True
        scene.bands[0], scene.bands[1] = 1.2, -0.02
    run_id = stored(tracker, served, scenes)
    assert all(r.ok for r in reproduce(tracker, run_id, predictor(served)))


def test_a_scene_that_shows_nothing_is_left_out(tracker: Tracker) -> None:
    served, _ = recording()
    scenes = [replace(s, bands=np.zeros_like(s.bands)) if i % 2 else s for i, s in enumerate(small_scenes(30))]
    run_id = stored(tracker, served, scenes)
    shown = [s.bands.any() for s in spread(manifest_of(served, scenes).of("validation"), SCENES)]
    assert 0 < sum(shown) < SCENES
    assert len(reproduce(tracker, run_id, predictor(served))) == sum(shown)
    log_stored(tracker, run_id, served, manifest_of(served, [replace(s, bands=0.0 * s.bands) for s in scenes]))
    with pytest.raises(TrackingError, match="no scene that shows anything"):
        reproduce(tracker, run_id, predictor(served))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (INDEX, "{"), (INDEX, "[]"), (INDEX, '{"tolerance": "x", "scenes": []}'), (INDEX, '{"tolerance": 1}'),
        (INDEX, '{"tolerance": 1, "scenes": [{"observation_id": "a", "image": "9", "prediction": "9", "params": {}}]}'),
        (INDEX, "[" * 100_000), (FILE, (9 << 20).to_bytes(8, "little") + b" " * (9 << 20)),
        (FILE, "no safetensors"), (FILE, save({"other": np.zeros(3)})),
    ],
)  # fmt: skip
def test_damaged(tracker: Tracker, file: str, content: str | bytes) -> None:
    served, _ = recording()
    run_id = stored(tracker, served, small_scenes(16))
    tracker.content(run_id, content.encode() if isinstance(content, str) else content, file)
    with pytest.raises(TrackingError, match="is damaged"):
        reproduce(tracker, run_id, predictor(served))


def test_a_run_that_stored_none(tracker: Tracker) -> None:
    run_id = tracker.start("older", "trial", {}, {})
    with pytest.raises(
        TrackingError, match=r"has no stored/scenes\.json; it did not finish, or is of an older version"
    ):
        reproduce(tracker, run_id, predictor(Served(Recorder(), card())))  # type: ignore[arg-type]  # it predicts
