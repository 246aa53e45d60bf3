"""A registry with models to serve: random weights, two versions that answer differently, and a broken one."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from crism_mlops.config import RunConfig
from crism_mlops.dataset.variants import InputTransform, channels
from crism_mlops.models import instruct_pix2pix, unet
from crism_mlops.models.checkpoint import Checkpoint, save_checkpoint
from crism_mlops.studies.served_description import description
from crism_mlops.tracking import Tracker

BANDS = ["PAN", "NIR", "RED"]
MODELS: dict[str, dict[str, Any]] = {
    "unet": {"kind": "unet", "encoder": "resnet18", "encoder_weights": None},
    "instruct_pix2pix": {"kind": "instruct_pix2pix", "pretrained": "tiny", "prompt": "carbonates"},
}


def log_random(
    tracker: Tracker, folder: Path, name: str, seed: int, kind: str = "unet", side: int = 32
) -> tuple[str, str]:
    """Register a model of random weights as `name`; its version and its run's id."""
    config = RunConfig.model_validate(
        {
            "data": {"source": "simulated", "resolution": side},
            # The tiny model's weights are what they are; another number of steps is another answer.
            "model": MODELS[kind] | ({"steps": 1 + seed} if kind == "instruct_pix2pix" else {}),
            "evaluate": {"chunk": 4, "seed": 4},
        }
    )
    built: Any
    if config.model.kind == "unet":
        built = unet.build(config.model, channels(config.data.variant), seed)
    else:
        built = instruct_pix2pix.build(config.model, seed)
    transform = InputTransform(config.data.variant, config.data.normalization)
    checkpoint = Checkpoint(config, transform, "0" * 16, 1, 1, 1.0, {})
    # Of this name alone a folder is served.
    place = folder / f"{name}-{seed}" / "checkpoint"
    save_checkpoint(built, place, checkpoint)
    run_id = tracker.start(f"{name}-{seed}", "trial", {"crism.model": kind}, {})
    model_id = tracker.model(run_id, place, description(checkpoint), channels=len(BANDS))
    tracker.end(run_id, "FINISHED")
    return register(tracker, name, f"models:/{model_id}", run_id), run_id


def register(tracker: Tracker, name: str, source: str, run_id: str) -> str:
    import mlflow

    mlflow.set_tracking_uri(tracker.uri)
    return str(mlflow.register_model(source, name, tags={"crism.run_id": run_id}).version)


def break_model(tracker: Tracker, folder: Path, name: str, version: str) -> str:
    """Register a copy of a version whose weights are cut off; its version."""
    import mlflow

    made = Path(mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{name}/{version}", tracking_uri=tracker.uri))
    place = folder / f"broken-{time.monotonic_ns()}"
    shutil.copytree(made, place)
    for file in place.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
    return str(tracker.client.create_model_version(name, str(place)).version)


def requests_of(count: int, side: int = 24, images: int = 1) -> list[tuple[dict[str, Any], bytes]]:
    """What to predict, as params and pixels for Python, and as a request's body."""
    rng, made = np.random.default_rng(3), []
    for index in range(count):
        pixels = rng.uniform(0.05, 0.4, (images, side, side, 3)).astype(np.float32)
        params = {"bands": BANDS, "seed": index}
        body = json.dumps({"inputs": pixels.tolist(), "params": params}).encode()
        made.append(({"pixels": pixels, "params": params}, body))
    random.Random(0).shuffle(made)
    return made
