"""Small checkpoints of random weights, and models that are no more than they are asked for, behind `Served`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crism_mlops.config import RunConfig
from crism_mlops.dataset.variants import VARIANT_BANDS, InputTransform, channels
from crism_mlops.models import instruct_pix2pix, unet
from crism_mlops.models.checkpoint import Checkpoint, save_checkpoint
from crism_mlops.scenes.scene import Scene
from crism_mlops.studies.request import Request
from crism_mlops.studies.served import Served

UNET = {"kind": "unet", "encoder": "resnet18", "encoder_weights": None}
IP2P = {
    "kind": "instruct_pix2pix", "pretrained": "tiny", "steps": 2,
    "prompt": "carbonates at {longitude}, {latitude}, {location}",
}  # fmt: skip


def card(model: dict[str, Any] | None = None, evaluate: dict[str, Any] | None = None, **data: Any) -> Checkpoint:
    """A checkpoint's card; `data` replaces keys of its data section, `side` and `carbonate` are the card's own."""
    own = {name: data.pop(name) for name in ("side", "carbonate") if name in data}
    config = RunConfig.model_validate(
        {
            "data": {"source": "simulated", "resolution": 32, **data},
            "model": model or UNET,
            "evaluate": {"chunk": 2, "seed": 4, **(evaluate or {})},
        }
    )
    transform = InputTransform(config.data.variant, config.data.normalization)
    return Checkpoint(config, transform, "0" * 16, 1, 1, 1.0, {}, **own)


def saved(folder: Path, of: Checkpoint) -> Path:
    """A checkpoint folder with random weights (of the tiny pipeline for InstructPix2Pix)."""
    model, data = of.config.model, of.config.data
    built: Any
    built = unet.build(model, channels(data.variant), 1) if model.kind == "unet" else instruct_pix2pix.build(model, 1)
    save_checkpoint(built, folder, of)
    return folder


class Recorder:
    """Gives the first three channels back, and remembers what it was asked."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []
        self.prompts: list[list[str]] = []
        self.seeds: list[list[int]] = []

    def predict(self, images: torch.Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        self.batches.append(images)
        self.prompts.append(list(prompts))
        self.seeds.append(list(seeds))
        return images[:, :3]


def recording(**changes: Any) -> tuple[Served, Recorder]:
    """A served U-Net that is none."""
    recorder = Recorder()
    return Served(recorder, card(**changes)), recorder  # type: ignore[arg-type]  # it predicts, and no more is asked


def image(height: int = 8, width: int = 8, bands: int = 3, seed: int = 0) -> np.ndarray:
    """I/F noise, H x W x C float32."""
    return np.random.default_rng(seed).uniform(0.1, 0.5, (height, width, bands)).astype(np.float32)


def asked(scene: Scene, served: Served, **changes: Any) -> Request:
    """A scene as a request for it."""
    variant = served.checkpoint.transform.variant
    channels = [scene.band_names.index(name) for name in VARIANT_BANDS[variant]]
    given = {"longitude": scene.longitude_deg, "latitude": scene.latitude_deg, "location": scene.region, **changes}
    return Request(scene.bands[..., channels], served.bands, **given)
