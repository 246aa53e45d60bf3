"""Samples a second of a training step: the engine against what the common diffusers script does in every step.

The script's step encodes both images with the autoencoder, and the prompt and the empty prompt with the text
encoder; then both do the same U-Net forward, backward and AdamW. Same shapes, batch, resolution, data and random
draws, in alternation. The model has the proportions of Stable Diffusion 1.5 (autoencoder to U-Net 1.117 : 0.803 in
arithmetic a forward pass), a quarter as wide, so that the limit is that of the real one: 1.93. What a CPU makes of
the arithmetic is another thing: narrow layers at full resolution wait for memory, so both are shown.

Then: where a step's time goes (InstructPix2Pix and U-Net), and what a step costs as views and scenes grow. Its last
line is the ratio. `--small` is for trying it out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from crism_mlops.config import InstructPix2PixModel, TrainConfig, UNetModel
from crism_mlops.models import instruct_pix2pix, unet
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.models.rows import Rows
from crism_mlops.scenes.store import map_tensors
from crism_mlops.training import train

TOKENS = 77
# Stable Diffusion 1.5 at 512 px, TFLOP a forward pass of one image: autoencoder's encoder, U-Net, text encoder.
REAL = {"encode": 1.117, "unet": 0.803, "text": 0.013}


def parts_of(width: int, resolution: int) -> dict[str, Any]:
    """SD 1.5's parts, `width` times as narrow, from random weights."""
    torch.manual_seed(0)
    tiny = instruct_pix2pix.build(InstructPix2PixModel(kind="instruct_pix2pix", pretrained="tiny"), 0)
    size = 768 // width
    # A little narrower still: so far from SD 1.5's size, attention takes less of the U-Net's arithmetic.
    narrow = tuple(c // width * 15 // 32 * 2 for c in (128, 256, 512, 512))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=narrow, layers_per_block=2, norm_num_groups=narrow[0] // 2,
    )  # fmt: skip
    denoiser = UNet2DConditionModel(
        sample_size=resolution // 8, in_channels=8, out_channels=4, layers_per_block=2,
        block_out_channels=tuple(c // width for c in (320, 640, 1280, 1280)), attention_head_dim=4,
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3), cross_attention_dim=size, norm_num_groups=4,
    )  # fmt: skip
    # A quarter of the layers: the text does not shrink with the image.
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tiny.tokenizer), hidden_size=size, intermediate_size=4 * size, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=TOKENS,
        )
    ).eval()  # fmt: skip
    scheduler = DDIMScheduler.from_config(
        tiny.scheduler.config, prediction_type="epsilon", rescale_betas_zero_snr=False
    )
    return {"vae": vae, "unet": denoiser, "text_encoder": text, "tokenizer": tiny.tokenizer, "scheduler": scheduler}


def flops(call: Callable[[], object]) -> tuple[float, float]:
    """Arithmetic of a forward pass, and seconds of the best of three."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        with torch.no_grad():
            call()
        seconds.append(time.perf_counter() - begun)
    return float(counter.get_total_flops()), min(seconds)


def script_steps(
    model: InstructPix2Pix, inputs: torch.Tensor, targets: torch.Tensor, tokens: torch.Tensor, steps: int, batch: int
) -> list[float]:
    """The step of diffusers' train_instruct_pix2pix.py; seconds of each."""
    optimizer = torch.optim.AdamW(model.unet.parameters(), lr=1e-5)
    noise_scheduler = DDPMScheduler.from_config(model.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    model.unet.train()
    times = []
    for _ in range(steps):
        begun = time.perf_counter()
        rows = torch.randint(0, len(inputs), (batch,), generator=generator)
        latents = model.vae.encode(targets[rows]).latent_dist.sample() * model.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (batch,), generator=generator)
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)
        words = model.text_encoder(tokens.expand(batch, TOKENS))[0]
        original = model.vae.encode(inputs[rows]).latent_dist.mode()
        chance = torch.rand(batch, generator=generator)
        null = model.text_encoder(model.tokenize([""]))[0]
        words = torch.where((chance < 0.1).reshape(-1, 1, 1), null, words)
        original = original * (1.0 - ((chance >= 0.05) & (chance < 0.15)).float()).reshape(-1, 1, 1, 1)
        output = model.unet(torch.cat([noisy, original], dim=1), timesteps, encoder_hidden_states=words).sample
        loss = torch.nn.functional.mse_loss(output.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begun)
    return times


def engine_steps(model: Any, data: Rows, steps: int, batch: int) -> list[float]:
    """Seconds of each of the engine's steps but the first, whose time is from the call on."""
    marks = [time.perf_counter()]
    few = data.only(torch.arange(len(data)) < steps * batch) if len(data) > steps * batch else data
    config = TrainConfig(learning_rate=1e-5, batch_size=batch, epochs=-(-steps * batch // len(few)))
    train(model, few, torch.ones(len(few)), config, 0, lambda step, total, loss: marks.append(time.perf_counter()))
    return list(np.diff(marks))[1:steps]


@contextmanager
def timed(model: Any, network: torch.nn.Module) -> Iterator[dict[str, float]]:
    """Seconds in the network's forward pass, in backward, in clipping, and in the optimiser."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    spent = {"forward": 0.0, "backward": 0.0, "gradient clipping": 0.0, "optimiser": 0.0}

    def around(owner: Any, name: str, label: str) -> tuple[Any, str, Any]:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            try:
                return real(*arguments, **options)
            finally:
                spent[label] += time.perf_counter() - begun

        setattr(owner, name, call)
        return owner, name, real

    places = [
        around(network, "forward", "forward"),
        around(Accelerator, "backward", "backward"),
        around(Accelerator, "clip_grad_norm_", "gradient clipping"),
        around(AcceleratedOptimizer, "step", "optimiser"),
    ]
    try:
        yield spent
    finally:
        for owner, name, real in places:
            setattr(owner, name, real)


def shares(title: str, model: Any, network: torch.nn.Module, data: Rows, steps: int, batch: int) -> None:
    engine_steps(model, data, 2, batch)
    with timed(model, network) as spent:
        marks: list[float] = []
        count: dict[str, dict[str, float]] = {}

        def on_step(step: int, total: int, loss: float) -> None:
            if step in (1, steps):
                marks.append(time.perf_counter())
                count[str(step)] = dict(spent)

        few = data.only(torch.arange(len(data)) < steps * batch)
        train(model, few, torch.ones(len(few)), TrainConfig(learning_rate=1e-5, batch_size=batch, epochs=1), 0, on_step)
    whole = marks[1] - marks[0]
    print(f"\n{title}, batch {batch}, {steps - 1} steps\n\n| part | ms a step | share |\n| --- | ---: | ---: |")
    parts = {name: count[str(steps)][name] - count["1"][name] for name in spent}
    for name, seconds in parts.items():
        print(f"| {name} | {1e3 * seconds / (steps - 1):.1f} | {seconds / whole:.1%} |")
    rest = whole - sum(parts.values())
    print(f"| all else: batch, draws, loss | {1e3 * rest / (steps - 1):.1f} | {rest / whole:.1%} |")
    useful = whole - rest - parts["gradient clipping"]
    print(f"| **forward, backward and optimiser** | | **{useful / whole:.1%}** |")


def stored(folder: Path, rows: int, shape: dict[str, tuple[int, ...]]) -> Rows:
    """Rows as the store keeps them: a file a scene of nine views, mapped into memory."""
    folder.mkdir(parents=True)
    blocks = []
    for scene in range(-(-rows // 9)):
        path = folder / f"{scene}.safetensors"
        tensors = {name: torch.rand(9, *size) for name, size in shape.items()}
        save_file({n: (t > 0.05) if n == "valid" else t for n, t in tensors.items()}, str(path))
        block = map_tensors(path)
        if "valid" in block:
            block["weight"] = block.pop("valid")
        blocks.append(block)
    return Rows(blocks)


def growth(folder: Path, model: InstructPix2Pix, latent: int, sizes: list[int], batch: int) -> None:
    print("\n| scenes | views | samples | MB of latents | s a step |\n| ---: | ---: | ---: | ---: | ---: |")
    shape = {"condition": (4, latent, latent), "mean": (4, latent, latent), "std": (4, latent, latent),
             "weight": (1, latent, latent)}  # fmt: skip
    words = model.text_encoder(model.tokenize(["Predict carbonates"]))[0].detach()
    for size in sizes:
        rows = stored(folder / str(size), size, shape)
        for block in rows._blocks:
            block["text_row"] = torch.zeros(9, dtype=torch.int64)  # type: ignore[index]
        rows.tables = {"text": words}
        # Rows from all over, not the first few.
        keep = torch.zeros(len(rows), dtype=torch.bool)
        keep[torch.linspace(0, len(rows) - 1, 9 * batch).long()] = True
        seconds = statistics.median(engine_steps(model, rows.only(keep), 5, batch))
        print(f"| {size // 9} | 9 | {size} | {rows.nbytes / 1e6:.0f} | {seconds:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny shapes: does it run?")
    parser.add_argument("--width", type=int, default=4, help="so many times narrower than SD 1.5")
    parser.add_argument("--resolution", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="steps a round")
    parser.add_argument("--batch", type=int, default=4)
    asked = parser.parse_args()
    width, resolution = (16, 64) if asked.small else (asked.width, asked.resolution)
    model = InstructPix2Pix(parts_of(width, resolution), InstructPix2PixModel(kind="instruct_pix2pix"))
    latent = resolution // 8
    image, noisy = torch.rand(1, 3, resolution, resolution) * 2 - 1, torch.randn(1, 8, latent, latent)
    tokens = model.tokenize(["Predict carbonates"])
    words = model.text_encoder(tokens)[0].detach()
    count = {
        "encode": flops(lambda: model.vae.encode(image)),
        "unet": flops(lambda: model.unet(noisy, torch.tensor([5]), encoder_hidden_states=words)),
        "text": flops(lambda: model.text_encoder(tokens)),
    }
    print(f"{resolution} px, batch {asked.batch}, {torch.get_num_threads()} threads\n")
    print("| forward pass | GFLOP here | of the U-Net's | in SD 1.5 | s here | of the U-Net's |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, (value, seconds) in count.items():
        real = REAL[name] / REAL["unet"]
        share, slow = value / count["unet"][0], seconds / count["unet"][1]
        print(f"| {name} | {value / 1e9:.2f} | {share:.3f} | {real:.3f} | {seconds:.3f} | {slow:.3f} |")
    limit = (2 * count["encode"][0] + 3 * count["unet"][0] + count["text"][0]) / (3 * count["unet"][0])
    print(f"\nlimit by arithmetic: {limit:.2f}")

    samples = 8 * asked.batch
    inputs, targets = (torch.rand(samples, 3, resolution, resolution) * 2 - 1 for _ in range(2))
    with torch.no_grad():
        encoded = [model.vae.encode(images).latent_dist for images in targets.split(4)]
        condition = torch.cat([model.vae.encode(images).latent_dist.mode() for images in inputs.split(4)])
    data = Rows(
        [{"condition": condition, "mean": torch.cat([e.mean for e in encoded]),
          "std": torch.cat([e.std for e in encoded]), "weight": torch.ones(samples, 1, latent, latent),
          "text_row": torch.zeros(samples, dtype=torch.int64)}], tables={"text": words},
    )  # fmt: skip
    script: list[float] = []
    engine: list[float] = []
    for index in range(asked.rounds + 1):
        one = script_steps(model, inputs, targets, tokens, asked.steps, asked.batch)
        two = engine_steps(model, data, asked.steps + 1, asked.batch)
        if index:  # The first round warms up.
            script, engine = script + one, engine + two
    rates = [asked.batch / statistics.median(times) for times in (script, engine)]
    spans = [f"{asked.batch / max(t):.2f}-{asked.batch / min(t):.2f}" for t in (script, engine)]
    print("\n| loop | samples a second, median (range) |\n| --- | ---: |")
    for name, rate, span in zip(("script: encodes in every step", "engine: cached"), rates, spans, strict=True):
        print(f"| {name} | {rate:.2f} ({span}) |")

    shares("InstructPix2Pix", model, model.unet, data, 5, asked.batch)
    with tempfile.TemporaryDirectory() as folder:
        side = 64 if asked.small else 256
        shape = {"input": (3, side, side), "target": (3, side, side), "valid": (1, side, side)}
        rows = stored(Path(folder, "unet"), 72, shape)
        network = unet.build(UNetModel(kind="unet", encoder_weights=None), 3, 0)
        shares(f"U-Net (resnet34), {side} px", network, network.module, rows, 9, 8)
        growth(Path(folder), model, latent, [90, 900, 9000], asked.batch)
    print(f"\nengine/script ratio: {rates[1] / rates[0]:.2f}")


if __name__ == "__main__":
    main()
