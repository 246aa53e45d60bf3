"""Stable Diffusion 1.5's real shapes with random weights, 512 px, on a CPU: does all of it work, and in what memory?

Builds the InstructPix2Pix (U-Net 860 M parameters, autoencoder 84 M, text encoder 123 M), caches the latents of a
scene, does one training step at batch 1 with gradient checkpointing, writes the state to resume from, starts anew from
it in another process's stead, does a second step, writes the checkpoint, reads it back and samples. Prints time and
peak memory of each part; it needs about 20 GB of disk below --work, and must stay inside 22 GB of memory.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from crism_mlops.config import DataConfig, EngineConfig, InstructPix2PixModel, TrainConfig
from crism_mlops.dataset.samples import Samples, build_samples
from crism_mlops.dataset.variants import fit_transform
from crism_mlops.models import instruct_pix2pix
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.models.latents import LatentCache
from crism_mlops.models.resume import ResumeFolder
from crism_mlops.scenes.scene import Scene
from crism_mlops.scenes.store import Store
from crism_mlops.training import train

SIDE = 512
LIMIT_GB = 22.0
CONFIG = InstructPix2PixModel(kind="instruct_pix2pix", steps=2)


def built() -> InstructPix2Pix:
    """SD 1.5's shapes (the configurations of runwayml/stable-diffusion-v1-5), a U-Net of 8 input channels."""
    torch.manual_seed(0)
    tiny = instruct_pix2pix.build(InstructPix2PixModel(kind="instruct_pix2pix", pretrained="tiny"), 0)
    parts: dict[str, Any] = {
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=SIDE,
        ),
        "unet": UNet2DConditionModel(
            sample_size=64, in_channels=8, cross_attention_dim=768, attention_head_dim=8,
            block_out_channels=(320, 640, 1280, 1280),
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12, projection_dim=768,
            )
        ).eval(),
        "tokenizer": tiny.tokenizer,
        "scheduler": DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
            set_alpha_to_one=False,
        ),
    }  # fmt: skip
    return InstructPix2Pix(parts, CONFIG)


def one_scene(folder: Path) -> Samples:
    rng = np.random.default_rng(0)
    bands, target = (rng.uniform(0.1, 0.9, (SIDE, SIDE, 3)).astype(np.float32) for _ in range(2))
    scene = Scene(
        observation_id="frt00000001", source="pairs", bands=bands, band_names=("PAN", "NIR", "RED"), target=target,
        valid=np.ones((SIDE, SIDE), dtype=bool), carbonate=None, carbonate_bearing=None, longitude_deg=77.58,
        latitude_deg=18.38, region="jezero",
    )  # fmt: skip
    data = DataConfig(
        source="pairs", store=str(folder), cache=str(folder), normalization="minmax", target_normalization="minmax",
        resolution=SIDE, views=("whole",),
    )  # fmt: skip
    return Samples([scene], build_samples([scene], data, fit_transform([scene], "pnr", "minmax"), 0), data)


peaks: list[float] = []


@contextmanager
def part(name: str) -> Iterator[None]:
    """A row of the table: seconds, and the most memory that the process held meanwhile (Linux counts it)."""
    Path("/proc/self/clear_refs").write_text("5")
    begun = time.monotonic()
    yield
    seconds = time.monotonic() - begun
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peaks.append(int(status["VmHWM"].split()[0]) / 2**20)
    print(f"| {name} | {seconds:.1f} | {peaks[-1]:.2f} |", flush=True)


class Enough(Exception):  # noqa: N818 -- stands for a kill
    pass


def stop(step: int, total: int, loss: float) -> None:
    print(f"<!-- step {step} of {total}: loss {loss:.4f} -->", flush=True)
    if step == 1:
        raise Enough


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="folder for 20 GB of files, removed at the end")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.work) as name:
        folder = Path(name)
        print(f"{SIDE} px, {torch.get_num_threads()} threads\n\n| part | s | peak memory, GiB |\n| --- | ---: | ---: |")
        with part("build from random weights"):
            model = built()
        sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model.unet, model.vae, model.text_encoder)]
        samples = one_scene(folder)
        store = Store(str(folder), folder)
        with part("cache latents of 1 view, 1 prompt"):
            data = model.prepare(samples, LatentCache(store))
        cache = LatentCache(store)
        with part("latents from the cache"):
            model.prepare(samples, cache)
        assert (cache.hits, cache.misses) == (3, 0)
        config = TrainConfig(batch_size=1, epochs=2, learning_rate=1e-5)
        engine = EngineConfig(gradient_checkpointing=True, save_minutes=0.0)
        resume = ResumeFolder(folder / "resume", "full size")
        with part("training step, state written"), suppress(Enough):
            train(model, data, torch.ones(1), config, 0, stop, engine=engine, resume=resume)
        state = sum(p.stat().st_size for p in resume.folder.rglob("*") if p.is_file())
        del model
        gc.collect()
        with part("build again, resume, second step, state written"):
            model = built()
            train(model, data, torch.ones(1), config, 0, stop, engine=engine, resume=resume)
        resume.clear()
        gc.collect()
        with part("write the checkpoint"):
            model.save(folder / "checkpoint")
        checkpoint = sum(p.stat().st_size for p in (folder / "checkpoint").rglob("*") if p.is_file())
        del model
        gc.collect()
        with part("read the checkpoint"):
            model = instruct_pix2pix.load(folder / "checkpoint", CONFIG)
        image = samples[0].input[None]
        with part(f"sample, {CONFIG.steps} steps of 3 guidance passes, decode"):
            predicted = model.predict(image, ["Predict carbonates"], [0])
        assert predicted.shape == (1, 3, SIDE, SIDE)
        assert bool(torch.isfinite(predicted).all())
    print(f"\nparameters, M: U-Net {sizes[0]:.1f}, autoencoder {sizes[1]:.1f}, text encoder {sizes[2]:.1f}")
    print(f"state to resume from {state / 1e9:.2f} GB, checkpoint {checkpoint / 1e9:.2f} GB")
    print(f"peak memory {max(peaks):.2f} GiB, limit {LIMIT_GB:.0f}: {'inside' if max(peaks) < LIMIT_GB else 'OVER'}")


if __name__ == "__main__":
    main()
