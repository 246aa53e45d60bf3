"""The autoencoder of four-band inputs, trained on a sweep's train scenes: what `model.input_vae` names."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from crism_mlops.config import InstructPix2PixModel, Section, SweepConfig, TrainConfig, load_sweep
from crism_mlops.dataset.manifest import Manifest, build_manifest
from crism_mlops.errors import ConfigError, DatasetError, ModelError, TrainingError
from crism_mlops.models.autoencoder import (
    AutoencoderCard,
    InputAutoencoder,
    check_replaceable,
    save_autoencoder,
    widened,
)
from crism_mlops.models.latents import weights_digest
from crism_mlops.models.parts import load_vae
from crism_mlops.models.rows import Rows
from crism_mlops.scenes.scene import Scene
from crism_mlops.studies.outcome import resolve_device
from crism_mlops.studies.run import seed_everything
from crism_mlops.training import train

log = logging.getLogger(__name__)
# Share of the steps in which the learning rate rises: without it, the first steps spoil weights that are good, and
# the latents' scale with them (from 1.57 to 2.31 on the quickstart's scenes at a rate of 1e-3).
WARM_UP = 0.1


class VaeSettings(Section):
    """How an autoencoder is trained; the rest is the sweep's."""

    epochs: int = Field(ge=1)
    learning_rate: float = Field(gt=0.0, le=1.0)
    batch_size: int = Field(ge=1)
    kl_weight: float = Field(ge=0.0, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class VaeHooks:
    """How a training tells what it does: `samples(done, total)`, `step(step, total, loss)`, and `epoch(entry)` with
    what was measured after each epoch, counted from 0, the start (see `InputAutoencoder.measure`)."""

    samples: Callable[[int, int], None] = lambda done, total: None
    step: Callable[[int, int, float], None] = lambda step, total, loss: None
    epoch: Callable[[dict[str, Any]], None] = lambda entry: None


def vae_settings(**given: float) -> VaeSettings:
    """Settings from the command's options. Raises ConfigError for one that makes no sense."""
    try:
        return VaeSettings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"{option} {first['input']}: {first['msg']}") from error


def load_vae_sweep(file: Path, overrides: Sequence[str] = ()) -> tuple[SweepConfig, InstructPix2PixModel]:
    """A sweep file whose data section has the variant cassis4, and its model.

    RunConfig refuses cassis4 for InstructPix2Pix as long as no autoencoder is named, and here there is none yet. So
    the file is read as if its variant were pnr, without its search, and only then the data section's variant
    becomes cassis4: of the file, data, split, model.pretrained or model.vae, engine, train.mixed_precision, seed and
    device count. Raises ConfigError for a U-Net, and for image pairs, which have three bands.
    """
    sweep = load_sweep(file, (*overrides, "data.variant=pnr", "search={}"))
    if sweep.model.kind != "instruct_pix2pix":
        raise ConfigError(
            f"{file}: its model is a U-Net, which takes four bands as they are (data.variant=cassis4); give an "
            "InstructPix2Pix sweep"
        )
    if sweep.data.source == "pairs":
        raise ConfigError(f"{file}: pairs hold PAN, NIR and RED only; four bands can be had of MTRDR scenes")
    data = sweep.data.model_copy(update={"variant": "cassis4"})
    return sweep.model_copy(update={"data": data}), sweep.model


def check_out(folder: Path, model: InstructPix2PixModel, force: bool) -> None:
    """Refuse, before anything is computed, a folder that must not be replaced. Raises ModelError."""
    check_replaceable(folder, force)
    if model.vae is not None and Path(model.vae).expanduser().resolve() == folder.resolve():
        raise ModelError(f"{folder}: it is model.vae, where the training starts; name another folder with --out")


def train_vae(
    sweep: SweepConfig,
    model: InstructPix2PixModel,
    scenes: Sequence[Scene],
    folder: Path,
    settings: VaeSettings,
    hooks: VaeHooks | None = None,
) -> AutoencoderCard:
    """Train on the train scenes of a sweep (from `load_vae_sweep`), keep the epoch with the least error on its
    validation scenes, write `folder`; returns its card. Test scenes are not looked at.

    It starts from the model's own autoencoder, see `autoencoder.widened`. The loss is L1 on valid pixels, and a little
    of the latents' divergence; the learning rate rises at first, then falls to 0 along a cosine. Nothing is
    written before the end. Raises DatasetError where no view shows data, ModelError where weights cannot be had
    or written, and TrainingError.
    """
    hooks = hooks or VaeHooks()
    manifest = build_manifest(scenes, sweep.data, sweep.split)
    seed_everything(sweep.seed)
    started = load_vae(model)
    autoencoder = InputAutoencoder(widened(started), settings.kl_weight, resolve_device(sweep.device))
    data, held_out = _rows(autoencoder, manifest, hooks)
    history = [{"epoch": 0, "loss": None, **autoencoder.measure(held_out)}]
    hooks.epoch(history[0])
    best, kept = history[0], _weights(autoencoder)

    def on_epoch(epoch: int, loss: float, last: bool) -> bool:
        nonlocal best, kept
        entry = {"epoch": epoch, "loss": loss, **autoencoder.measure(held_out)}
        history.append(entry)
        hooks.epoch(entry)
        if math.isfinite(entry["rmse"]) and entry["rmse"] < best["rmse"]:
            best, kept = entry, _weights(autoencoder)
        return False

    _train(autoencoder, data, sweep, settings, hooks, on_epoch)
    if best["epoch"] == 0:
        log.warning("no epoch was better than the start, which is kept: lower --learning-rate, or train for longer")
    autoencoder.vae.load_state_dict(kept)
    seen = {"train": manifest.split.train, "validation": manifest.split.validation}
    card = AutoencoderCard(
        sweep.study, manifest.digest, sweep.data.normalization, sweep.seed, settings.model_dump(),
        weights_digest(started), best["epoch"], tuple(history), seen,
    )  # fmt: skip
    return save_autoencoder(autoencoder.vae, folder, card)


def _rows(autoencoder: InputAutoencoder, manifest: Manifest, hooks: VaeHooks) -> tuple[Rows, Rows]:
    """Every view of the train scenes; the validation scenes as they are."""
    whole = replace(manifest, data=manifest.data.model_copy(update={"views": ("whole",)}))
    data = autoencoder.prepare(manifest.samples("train", on_scene=hooks.samples))
    held_out = autoencoder.prepare(whole.samples("validation", on_scene=hooks.samples))
    for part, rows in (("train", data), ("validation", held_out)):
        if not len(rows):
            raise DatasetError(f"none of the {part} scenes shows any data at {manifest.data.resolution} px; add scenes")
    return data, held_out


def _train(
    autoencoder: InputAutoencoder,
    data: Rows,
    sweep: SweepConfig,
    settings: VaeSettings,
    hooks: VaeHooks,
    on_epoch: Callable[[int, float, bool], bool],
) -> None:
    import torch

    steps = -(-len(data) // settings.batch_size) * settings.epochs
    config = TrainConfig(
        learning_rate=settings.learning_rate, batch_size=settings.batch_size, epochs=settings.epochs,
        schedule="cosine", warmup_steps=round(WARM_UP * steps), mixed_precision=sweep.train.mixed_precision,
    )  # fmt: skip
    try:
        weights = torch.ones(len(data), dtype=torch.float64)
        train(autoencoder, data, weights, config, sweep.seed, hooks.step, on_epoch, sweep.engine)
    except TrainingError as error:
        raise TrainingError(f"{error} (train-vae takes it as --learning-rate; nothing is written)") from error


def _weights(autoencoder: InputAutoencoder) -> dict[str, Any]:
    return {name: tensor.detach().cpu().clone() for name, tensor in autoencoder.vae.state_dict().items()}
